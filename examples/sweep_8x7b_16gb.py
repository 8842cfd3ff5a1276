"""Mixtral 8x7B on three consumer cards: speed against GPU memory. A SIMULATION, not a measurement.

    python examples/sweep_8x7b_16gb.py [folder for the results]

The cards are the descriptions that ship with `tiered`; the routing is synthetic, with the numbers
given below: there is no public trace of Mixtral to start from. Writes mixtral-8x7b-16gb.csv, and a
picture where matplotlib is installed.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from tiered.measuring import sweep
from tiered.measuring.plot import plot_sweep
from tiered.measuring.results import ResultFile
from tiered.planning import hardware, shapes, sizes
from tiered.planning.synthetic import Locality, routing

CARDS = "rtx3060-12gb", "rtx4060ti-16gb", "rtx5080-16gb"
VRAM = tuple(gib << 30 for gib in (4, 6, 8, 10, 12, 14, 16, 20, 24, 28))
RAM = 32 << 30
CONTEXT = 1024
# A third of a token's experts are those of the token before; popularity falls as rank ** -0.35.
ROUTING = Locality(popularity=0.35, repeat=0.33)
SEED = 0
WARM = 64  # tokens before the clock starts


def main(
    folder: Path, vram: Sequence[int] = VRAM, cards: Sequence[str] = CARDS, num_tokens: int = 192
) -> list[dict[str, str]]:
    """All rows of the sweep, also those that an earlier run wrote."""
    folder.mkdir(parents=True, exist_ok=True)
    model = sizes.of_shape(shapes.find("mixtral-8x7b"), "q4_0")
    made = routing(model.num_layers, model.num_experts, model.top_k, num_tokens, ROUTING, SEED)
    name = f"synthetic, popularity {ROUTING.popularity}, repeat {ROUTING.repeat}, seed {SEED}"
    results = ResultFile(folder / "mixtral-8x7b-16gb.csv", sweep.COLUMNS, sweep.NUM_KEYS)
    rows = []
    for card in cards:
        for point in sweep.grid(ram=[RAM], context=[CONTEXT], vram=vram):
            key = sweep.key(model.name, card, name, point)
            if key not in results:
                got = sweep.simulate(
                    model, hardware.find(card), point, tokens=made[WARM:], warm=made[:WARM]
                )
                results.append({**key, **got})
            rows.append(results.find(key))
            row = rows[-1]
            print(f"{card:16s} {point.vram >> 30:3d} GiB {float(row['tok_s']):6.1f} tokens/s")
    roofs = {
        f"the GPU memory of {card}": sweep.roofs(model, hardware.find(card))["GPU memory"]
        for card in cards
    }
    try:
        plot_sweep(
            rows, folder / "mixtral-8x7b-16gb.png", roofs, "Mixtral 8x7B, 4 bits, 32 GiB of RAM",
            "SIMULATED, not measured; synthetic routing",
        )  # fmt: skip
    except RuntimeError as error:
        print(error)
    return rows


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "."))
