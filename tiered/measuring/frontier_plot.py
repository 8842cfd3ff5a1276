"""The picture of a frontier: speed against what was lost, one line for each budget of memory."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from tiered.measuring.plot import COLORS, MARKERS, new_figure, set_title
from tiered.memory import format_bytes

Row = Mapping[str, str]
# Where a label may stand beside its point: in steps of its own size, the nearest first.
DIRECTIONS = (1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (-1, 1), (1, -1), (-1, -1)
NOTHING = 1e-5  # nats: what rounding makes of saved log-probabilities
DISTANCES = 6, 14, 24, 36, 50, 66, 84  # points


def plot_frontiers(
    rows: Sequence[Row], best: Mapping[str, Sequence[int]], path: Path, title: str, note: str
) -> None:
    """Write a picture (.png, .svg or .pdf) of a grid's rows; `best` has, by budget, the positions
    of those that no other beats.

    Raises RuntimeError that says what to install if matplotlib is missing.
    """
    done = [i for i, row in enumerate(rows) if not row["problem"]]
    if not done:
        raise ValueError("nothing to plot: no point of the grid runs")
    figure, axes = new_figure()
    _dress(axes, [float(rows[i]["kl"]) for i in done])
    marked: list[tuple[int, str]] = []  # points that get a label, in the color of their line
    for index, (budget, found) in enumerate(best.items()):
        color = COLORS[index % len(COLORS)]
        marker = MARKERS[index % len(MARKERS)]
        under = [i for i in done if rows[i]["expert_ram"] == budget]
        beaten = [_place(rows[i]) for i in under if i not in found]
        if beaten:
            axes.scatter(*zip(*beaten, strict=True), s=22, color=color, marker=marker, alpha=0.35)
        if found:
            axes.plot(
                *zip(*(_place(rows[i]) for i in found), strict=True), label=_budget(budget),
                color=color, marker=marker, linewidth=1.8, markersize=6,
            )  # fmt: skip
        marked += [(i, color) for i in found]
    set_title(figure, axes, title, note)
    if len(best) > 1:
        axes.legend(title="memory for experts", frameon=False, fontsize=9, title_fontsize=9)
    axes.set_ylim(bottom=0)
    lines = [[_place(rows[i]) for i in found] for found in best.values()]
    _label(figure, axes, [(describe(rows[i], rows), _place(rows[i]), color) for i, color in marked],
           [[_place(rows[i])] for i in done] + lines)  # fmt: skip
    figure.savefig(path)


def describe(row: Row, rows: Sequence[Row]) -> str:
    """What a row has that others of `rows` have not, budgets aside."""
    parts = [words(row) for name, words in WORDS.items() if len({r[name] for r in rows}) > 1]
    return " · ".join(filter(None, parts)) or row["quantize"]


WORDS: Mapping[str, Any] = {
    "model": lambda row: Path(row["model"]).name,
    "quantize": lambda row: "as stored" if row["quantize"] == "none" else row["quantize"],
    "experts": lambda row: f"{row['experts']} experts",
    "top_k": lambda row: f"top {row['top_k']}" if row["top_k"] != "0" else "",
    "layer_k": lambda row: Path(row["layer_k"]).stem if row["layer_k"] else "",
    "top_p": lambda row: f"top-p {row['top_p']}" if float(row["top_p"]) < 1 else "",
    "min_weight": lambda row: f"min {row['min_weight']}" if float(row["min_weight"]) else "",
}


def _place(row: Row) -> tuple[float, float]:
    return float(row["kl"]), float(row["decode_tok_s"])


def _budget(nbytes: str) -> str:
    return format_bytes(int(nbytes)) if int(nbytes) else "all"


def _dress(axes: Any, losses: Sequence[float]) -> None:
    from matplotlib.ticker import FuncFormatter

    # A logarithm, but for what is as good as nothing: that is left of the least power of ten.
    some = [loss for loss in losses if loss > NOTHING]
    if some:
        axes.set_xscale("symlog", linthresh=10 ** math.floor(math.log10(min(some))))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axes.set_xlabel("KL divergence from the weights as stored (nats per token); left is nearer")
    axes.set_ylabel("tokens per second")
    axes.margins(0.12, 0.14)
    axes.grid(color="#e3e7ea", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _label(
    figure: Any,
    axes: Any,
    labels: Sequence[tuple[str, tuple[float, float], str]],
    drawn: Sequence[Sequence[tuple[float, float]]],
) -> None:
    """Name points (text, place, color) where the name covers neither what is drawn, points and
    lines, nor other names."""
    figure.draw_without_rendering()  # so that places are known
    figure.set_layout_engine("none")  # and stay
    ink = [spot for line in drawn for spot in _along(axes.transData.transform(line))]
    legend = axes.get_legend()
    taken = [legend.get_window_extent()] if legend else []
    for name, place, color in labels:
        text = axes.annotate(
            name, place, xytext=(0, 0), textcoords="offset points", fontsize=8, color=color,
            va="center",
            arrowprops={"arrowstyle": "-", "color": color, "linewidth": 0.6, "alpha": 0.6},
        )  # fmt: skip
        point = axes.transData.transform(place)
        for distance in DISTANCES:
            box, leader = _free_spot(text, point, distance, axes, ink, taken)
            if box is not None:
                taken.append(box)
                ink += leader
                break
        else:
            text.remove()  # the table has it


def _along(line: Any) -> list[Any]:
    """Points of a line, a few pixels apart: of [n, 2] in pixels."""
    import numpy as np

    spots = list(line)
    for start, end in pairwise(line):
        count = int(np.hypot(*(end - start)) // 4) + 1
        spots += list(np.linspace(start, end, count, endpoint=False))
    return spots


def _free_spot(
    text: Any, point: Any, distance: float, axes: Any, ink: list[Any], taken: list[Any]
) -> tuple[Any, list[Any]]:
    """Move a label to a place that far from its point where nothing is: what it covers there, and
    the line that leads to it; or None."""
    import numpy as np
    from matplotlib.text import Text

    room = axes.get_window_extent()
    for dx, dy in DIRECTIONS:
        text.set_ha({1: "left", 0: "center", -1: "right"}[dx])
        text.set_position((dx * distance, dy * distance))
        text.update_positions(axes.figure.canvas.get_renderer())
        box = Text.get_window_extent(text).padded(4)  # an annotation's own has its arrow, too
        middle = (box.x0 + box.x1) / 2, (box.y0 + box.y1) / 2
        leader = [spot for spot in _along(np.array([point, middle])) if not box.contains(*spot)]
        inside = room.x0 <= box.x0 and box.x1 <= room.x1 and room.y0 <= box.y0 and box.y1 <= room.y1
        if (
            inside
            and not any(box.contains(*spot) for spot in ink)
            and not any(box.overlaps(other) for other in taken)
            and not any(other.contains(*spot) for other in taken for spot in leader)
        ):
            return box, leader
    return None, []
