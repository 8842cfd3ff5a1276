"""Generate text on a laptop without a GPU, with a memory budget.

    python examples/laptop.py --model MODEL --expert-ram 2G "Why is the sky blue?"

MODEL is a GGUF file, a Hugging Face folder or a store. Without one, the demo model is used.
"""

from __future__ import annotations

import argparse

from tiered import Engine
from tiered.demo import demo_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("prompt", nargs="?", default="Why is the sky blue?")
    parser.add_argument("--model", help="default: the demo model")
    parser.add_argument("--expert-ram", default=None)
    parser.add_argument("--max-new-tokens", type=int, default=48)
    arguments = parser.parse_args()

    with Engine(arguments.model or demo_model(), expert_ram=arguments.expert_ram) as engine:
        messages = [{"role": "user", "content": arguments.prompt}]
        for piece in engine.chat(messages, arguments.max_new_tokens):
            print(piece, end="", flush=True)
        stats = engine.stats
    print(f"\n{stats.decode_tok_s:.1f} tokens/s, hit rate {stats.hit_rate:.1%}")


if __name__ == "__main__":
    main()
