"""Milliseconds per token over GPU memory: misses shared between processor and link, against plans
that never change. A SIMULATION, not a measurement.

    python examples/hybrid_against_static.py [folder for the results]

For Mixtral 8x7B and Qwen3-30B-A3B on every card whose description ships with `tiered`, with all of
its memory and with less, and synthetic routing. Takes minutes; what an earlier run wrote is kept.
Writes a CSV with all strategies for each model, and a picture of the hybrid's where matplotlib is
installed.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from tiered.measuring import sweep
from tiered.measuring.plot import plot_sweep
from tiered.measuring.results import ResultFile
from tiered.planning import hardware, shapes, sizes
from tiered.planning.strategies import STRATEGIES

MODELS = {
    "mixtral-8x7b": (4, 6, 8, 10, 12, 14, 16, 20, 24, 28),  # GiB of GPU memory
    "qwen3-30b-a3b": (4, 6, 8, 10, 12, 14, 16, 20),
}
CARDS = [name for name in hardware.names() if hardware.find(name).gpu is not None]
RAM = 64 << 30
HYBRID = "tiered"
NOTE = "SIMULATED, not measured; synthetic routing"


def main(
    folder: Path, models: Mapping[str, Sequence[int]] = MODELS, cards: Sequence[str] = CARDS
) -> list[float]:
    """How much longer the best static plan takes than the hybrid, as a ratio, at each point."""
    folder.mkdir(parents=True, exist_ok=True)
    ratios = []
    for name, vram in models.items():
        results = ResultFile(folder / f"{name}.csv", sweep.COLUMNS, sweep.NUM_KEYS)
        for card in cards:
            has = hardware.find(card).gpu.vram >> 30
            ratios += [compare(name, card, gib << 30, results) for gib in vram if gib <= has]
        try:
            rows = [row for row in results.rows if row["strategy"] == HYBRID]
            plot_sweep(rows, folder / f"{name}.png", {}, f"{name}, 4 bits, hybrid", NOTE)
        except RuntimeError as error:
            print(error)
    print(
        f"{NOTE}. The best static plan takes {min(ratios):.2f} to {max(ratios):.2f} times as long"
    )
    return ratios


def compare(name: str, card: str, vram: int, results: ResultFile) -> float:
    """The ratio at one point; what an earlier run wrote is not simulated again."""
    model, milliseconds = sizes.of_shape(shapes.find(name), "q4_0"), {}
    for strategy in STRATEGIES:
        point = sweep.Point(vram=vram, ram=RAM, strategy=strategy)
        key = sweep.key(model.name, card, "synthetic, typical", point)
        if key not in results:
            results.append({**key, **sweep.simulate(model, hardware.find(card), point)})
        milliseconds[strategy] = float(results.find(key)["ms_per_token"])
    ours = milliseconds.pop(HYBRID)
    best = min(milliseconds, key=milliseconds.__getitem__)
    print(
        f"{name:14s} {card:16s} {vram >> 30:3d} GiB: {ours:7.1f} ms a token, "
        f"{milliseconds[best]:7.1f} with {best}"
    )
    return milliseconds[best] / ours


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "."))
