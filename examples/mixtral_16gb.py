"""Mixtral 8x7B on a card with 16 GB: which budgets make sense, how fast each would be, and a run.

    python examples/mixtral_16gb.py
    python examples/mixtral_16gb.py --model mixtral-8x7b-q4_0.gguf --device cuda

The table is SIMULATED for a described card. With a model, it is also run on `--device`, with each
budget, and what came out is printed beside the forecast. No card has been tried yet; "sim" computes
as a GPU would, on the processor, and says nothing about speed; "sim:rtx4060ti-16gb" is a described
card on a virtual clock, with the scheduler that a real one gets.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from tiered import Engine
from tiered.commands.plan import describe
from tiered.memory import format_bytes, parse_bytes
from tiered.planning import hardware
from tiered.planning.plan import Plan, make_plan
from tiered.planning.sizes import ModelSizes

MODEL, QUANT, CARD = "mixtral-8x7b", "q4_0", "rtx4060ti-16gb"
CONTEXT, PROMPT, SEED = 4096, 64, 0


def forecast(model: ModelSizes, card: str, vram: int, ram: int) -> Plan:
    machine = hardware.find(card).with_sizes(vram=vram)
    return make_plan(model, machine, context=CONTEXT, prompt_tokens=PROMPT, ram=ram)


def measure(model: Path, device: str, vram: int, ram: int, num_tokens: int) -> tuple[float, float]:
    """Tokens per second after a random prompt (of virtual time, on a described card), and the share
    of experts that were on the card."""
    with Engine(model, device=device, vram=vram, ram=ram) as engine:
        size, count = engine.config.vocab_size, min(PROMPT + num_tokens, engine.context)
        ids = np.random.default_rng(SEED).integers(0, size, count).tolist()
        engine.score_tokens(ids[: count // 2], ids[count // 2 :])
        source = engine.decoder.source
        asked = source.hits + source.copies + source.computed_in_ram
        speed = engine.stats.simulated_decode_tok_s or engine.stats.decode_tok_s
        return speed, source.hits / max(1, asked)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a file or folder; default: the shape of Mixtral 8x7B")
    parser.add_argument("--card", default=CARD, help="a described machine (tiered plan --help)")
    parser.add_argument("--device", help="cuda, cuda:1, ..., sim or sim:CARD; default: none")
    parser.add_argument("--vram", default="8G,12G,16G", help="budgets, with commas between them")
    parser.add_argument("--ram", default="28G", help="what the process may hold (default: 28G)")
    parser.add_argument("--tokens", type=int, default=64, help="to generate in a run")
    arguments = parser.parse_args()
    model, ram = describe(arguments.model or MODEL, QUANT, "f16"), parse_bytes(arguments.ram)
    print(f"{model.name}: {format_bytes(model.total)}, on {hardware.find(arguments.card).label}")
    for vram in map(parse_bytes, arguments.vram.split(",")):
        plan = forecast(model, arguments.card, vram, ram)
        line = f"{format_bytes(vram):>8s} {plan.low:6.1f} to {plan.high:6.1f} tokens/s forecast"
        if arguments.model and arguments.device and plan.runs:
            speed, hits = measure(
                Path(arguments.model), arguments.device, vram, ram, arguments.tokens
            )
            how = "simulated" if arguments.device.startswith("sim:") else "measured"
            line += f", {speed:.1f} {how} ({hits:.0%} of the experts were on the card)"
        print(f"{line}: {plan.verdict}")
    print("forecasts are simulated, not measured")


if __name__ == "__main__":
    main()
