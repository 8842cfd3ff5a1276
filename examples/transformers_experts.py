"""A Hugging Face model whose experts run through our tiers: transformers' own generate.

    pip install 'tiered[transformers]'
    python examples/transformers_experts.py FOLDER "Once upon a time" --expert-ram 2G

FOLDER is a Hugging Face folder of a Mixture-of-Experts model.
"""

from __future__ import annotations

import argparse

from transformers import AutoModelForCausalLM, AutoTokenizer

from tiered.transformers import TieredConfig, experts_of


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("prompt", nargs="?", default="Once upon a time")
    parser.add_argument("--expert-ram", default=None)
    arguments = parser.parse_args()

    config = TieredConfig(expert_ram=arguments.expert_ram)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, quantization_config=config)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    with experts_of(model) as experts:
        inputs = tokenizer(arguments.prompt, return_tensors="pt", return_token_type_ids=False)
        ids = model.generate(**inputs, max_new_tokens=32)
        print(tokenizer.decode(ids[0], skip_special_tokens=True))
        print(f"hit rate {experts.stats.hit_rate:.1%}, {experts.stats.bytes_read} bytes read")


if __name__ == "__main__":
    main()
