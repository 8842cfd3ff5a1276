"""A laptop with 8 GB and no GPU: what to expect of known models, then of yours, and a run.

    python examples/laptop_8gb.py
    python examples/laptop_8gb.py --model qwen3-30b-a3b-q4_0.gguf "Why is the sky blue?"

The table is SIMULATED for a described laptop. With a model (a GGUF file, a Hugging Face folder or a
store; "demo" is the demo's), this machine is measured, the model forecast on it and run, within the
same memory, and both are printed.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from tiered import Engine
from tiered.commands.plan import describe, measured
from tiered.demo import demo_model
from tiered.memory import parse_bytes
from tiered.planning import hardware, shapes, sizes
from tiered.planning.plan import make_plan

LAPTOP, MEMORY = "laptop", "8G"
KNOWN = {"olmoe-1b-7b": "q4_0", "gpt-oss-20b": "mxfp4", "qwen3-30b-a3b": "q4_0"}
CONTEXT = 2048


def forecasts(ram: int) -> None:
    """What known models would do on the described laptop, of which a process may hold `ram`."""
    laptop = hardware.find(LAPTOP).with_sizes(ram=parse_bytes(MEMORY))
    for name, quant in KNOWN.items():
        plan = make_plan(sizes.of_shape(shapes.find(name), quant), laptop, context=CONTEXT, ram=ram)
        print(f"{name:14s} {quant:6s} {plan.low:5.1f} to {plan.high:5.1f} tokens/s: {plan.verdict}")
    print("simulated, not measured")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("prompt", nargs="?", default="Why is the sky blue?")
    parser.add_argument("--model", help='file, folder or "demo"; default: none is run')
    parser.add_argument("--ram", default="6G", help="what the process may hold (default: 6G)")
    parser.add_argument("--max-new-tokens", type=int, default=48)
    arguments = parser.parse_args()
    ram = parse_bytes(arguments.ram)
    forecasts(ram)
    if arguments.model is None:
        return
    model = demo_model() if arguments.model == "demo" else Path(arguments.model)
    described = describe(str(model), "q4_0", "f16")
    machine = measured(model, described, "q4_0", threads=None)
    plan = make_plan(described, machine, context=CONTEXT, ram=ram)
    print(f"\n{described.name} on this machine: {plan.verdict}")
    if not plan.runs:
        return
    with Engine(model, ram=ram, context=min(CONTEXT, described.context_length)) as engine:
        messages = [{"role": "user", "content": arguments.prompt}]
        for piece in engine.chat(messages, arguments.max_new_tokens):
            print(piece, end="", flush=True)
        stats = engine.stats
    print(
        f"\n{stats.decode_tok_s:.1f} tokens/s, hit rate {stats.hit_rate:.1%}; "
        f"forecast {plan.low:.1f} to {plan.high:.1f} tokens/s"
    )


if __name__ == "__main__":
    main()
