"""Plots: a sweep's speed against memory, and the kernels' under the roofs of this machine."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from tiered.measuring.kernel_report import most_threads

LABELS = {
    "vram": "GPU memory (GiB)",
    "ram": "RAM (GiB)",
    "context": "context (tokens)",
    "top_k": "experts per token",
    "look_ahead": "look-ahead (layers)",
}
COLORS = ("#0b6e99", "#d9730d", "#4d7c3a", "#9b3d8f", "#b5383a", "#5b6770", "#8a6d1d", "#2f4b9c")
MARKERS = "osD^vPX*"


def plot_sweep(
    rows: Sequence[dict[str, str]], path: Path, roofs: dict[str, float], title: str, note: str
) -> None:
    """Write a picture (.png, .svg or .pdf) of a sweep's rows.

    Raises RuntimeError that says what to install if matplotlib is missing.
    """
    done = [row for row in rows if not row["problem"]]
    if not done:
        raise ValueError("nothing to plot: no point of the sweep runs")
    axis = next((name for name in LABELS if len({row[name] for row in done}) > 1), "ram")
    figure, axes = new_figure()
    series = series_of(done, axis)
    for index, (name, points) in enumerate(series.items()):
        axes.plot(
            [x for x, _ in points], [y for _, y in points], label=name or "tokens per second",
            color=COLORS[index % len(COLORS)], marker=MARKERS[index % len(MARKERS)],
            linewidth=2, markersize=5,
        )  # fmt: skip
    speeds = [y for points in series.values() for _, y in points]
    _draw_roofs(axes, roofs, speeds)
    _dress(axes, axis, [x for points in series.values() for x, _ in points])
    set_title(figure, axes, title, note)
    if len(series) > 1:
        axes.legend(facecolor="white", edgecolor="none", framealpha=1, fontsize=9, loc="best")
    figure.savefig(path)


def plot_kernels(report: dict[str, Any], path: Path) -> None:
    """Write the roofline of a kernel report: operations per second over operations per byte of
    weights, with all threads. Raises like `plot_sweep`."""
    figure, axes = new_figure()
    threads = most_threads(report)
    rows = [row for row in report["kernels"] if row.get("threads", 0) == threads]
    bandwidth = next(row["bandwidth_gb_s"] for row in rows if "gb_s" in row)
    peak = next(row["peak_gops"] for row in rows if "gops" in row)
    points: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        per_byte = 2 * row["rows"] * row["shape"][1] / row["row_bytes"]
        gops = row["gops"] if "gops" in row else row["gb_s"] * per_byte
        points.setdefault(row["format"], []).append((per_byte, gops))
    xs = [x for series in points.values() for x, _ in series]
    ends = [0.7 * min(xs), peak / bandwidth, 1.5 * max(xs)]
    axes.plot(ends, [ends[0] * bandwidth, peak, peak], color="#9aa5ad", linewidth=2, zorder=0)
    for index, (name, series) in enumerate(points.items()):
        axes.scatter(
            [x for x, _ in series], [y for _, y in series], label=name, s=28,
            color=COLORS[index % len(COLORS)], marker=MARKERS[(index + index // 8) % len(MARKERS)],
        )  # fmt: skip
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("operations per byte of weights (left: one row, right: many)")
    axes.set_ylabel("billion operations per second")
    axes.grid(color="#e3e7ea", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.legend(frameon=False, fontsize=8, ncols=2, loc="lower right")
    where = f"{threads} threads, {report['isa']}" if threads else report["card"]
    kind = "byte" if threads else "float16"
    note = (
        f"{where}: {bandwidth:.1f} GB/s of read bandwidth, "
        f"{peak:.0f} billion {kind} operations per second"
    )
    set_title(figure, axes, "Kernels under this machine's roofs", note)
    figure.savefig(path)


def plot_distillation(report: dict[str, Any], path: Path, name: str) -> None:
    """Write a picture of how the layers' held-out errors fell, epoch by epoch, and of each layer's
    before and after; and, if it was trained by logits, of the divergence. Raises like
    `plot_sweep`."""
    logits = report["logits"]
    columns = 3 if logits else 2
    figure, falling = new_figure(1, columns)
    ends = figure.add_subplot(1, columns, 2, sharey=falling)
    if logits:
        figure.set_size_inches(12.4, 5.2)
        last = figure.add_subplot(1, columns, 3)
        last.plot(logits["steps"], logits["held_out"], color=COLORS[2], marker="^", markersize=4)
        last.set_xlabel("steps by logits")
        last.set_ylabel("held-out KL divergence (nats)")
        last.set_ylim(bottom=0)
        last.grid(axis="y", color="#e3e7ea", linewidth=0.8)
    layers = {int(layer): found for layer, found in report["layers"].items()}
    starts = {layer: found["beginnings"][found["beginning"]] for layer, found in layers.items()}
    colors = _by_depth(figure, falling, layers)
    for layer, found in layers.items():
        errors = [starts[layer], *(epoch["held_out"] for epoch in found["epochs"])]
        falling.plot(range(len(errors)), errors, color=colors.to_rgba(layer), linewidth=1.2)
    falling.set_xlabel("epochs")
    before, after = list(starts.values()), [found["error"] for found in layers.values()]
    for label, values, color, marker in (
        ("before training", before, COLORS[1], "o"), ("after", after, COLORS[0], "s")
    ):  # fmt: skip
        ends.plot(list(layers), values, label=label, color=color, marker=marker, markersize=4)
    ends.set_xlabel("layer")
    ends.legend(frameon=False, fontsize=9)
    for axes in (falling, ends):
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_yscale("log")
        axes.grid(axis="y", color="#e3e7ea", linewidth=0.8)
        axes.set_axisbelow(True)
    falling.set_ylabel("held-out error (1: saying nothing)")
    made = f"{report['experts']} experts" if report["experts"] else "one feed-forward"
    note = f"{report['tokens']} tokens of text, an eighth held out"
    set_title(figure, falling, f"{name}, distilled into {made} a layer", note)
    figure.savefig(path)


def _by_depth(figure: Any, axes: Any, layers: Collection[int]) -> Any:
    """A colour for each layer, and the bar that tells which."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    colors = ScalarMappable(Normalize(min(layers), max(max(layers), 1)), "viridis")
    bar = figure.colorbar(colors, ax=axes, label="layer")
    bar.locator.set_params(integer=True)
    return colors


def check_plot(path: Path) -> None:
    """Before a long run: RuntimeError without matplotlib, ValueError for another kind of file."""
    figure, _ = new_figure()
    known = figure.canvas.get_supported_filetypes()
    if path.suffix.removeprefix(".") not in known:
        raise ValueError(f"--plot {path}: a picture is .png, .svg or .pdf")


def new_figure(rows: int = 1, columns: int = 1) -> tuple[Any, Any]:
    """A figure and its (first) axes; RuntimeError without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise RuntimeError("a plot needs matplotlib: pip install 'tiered[plot]'") from error
    figure = Figure(figsize=(8.6, 5.2), layout="constrained", dpi=150)
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot(rows, columns, 1)


def set_title(figure: Any, axes: Any, title: str, note: str) -> None:
    figure.suptitle(title, x=0.012, ha="left", fontsize=13, fontweight="bold")
    axes.set_title(note, loc="left", fontsize=9, color="#5b6770")


def series_of(rows: Sequence[dict[str, str]], axis: str) -> dict[str, list[tuple[float, float]]]:
    """Curves by what differs between rows besides the axis: name -> [(x, tokens per second)]."""
    names = ("hardware", "model", "strategy", "policy", "ram", "look_ahead", "top_k", "context")
    differing = [name for name in names if name != axis and len({row[name] for row in rows}) > 1]
    series: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        label = " · ".join(_value(name, row[name]) for name in differing)
        series.setdefault(label, []).append((_number(axis, row[axis]), float(row["tok_s"])))
    return {label: sorted(points) for label, points in series.items()}


def _number(axis: str, value: str) -> float:
    return float(value) / (1 << 30) if axis in ("vram", "ram") else float(value)


def _value(name: str, value: str) -> str:
    if name in ("vram", "ram"):
        return f"{float(value) / (1 << 30):g} GiB {name.upper()}"
    words = {"look_ahead": "look-ahead", "top_k": "top", "context": "context"}
    return f"{words[name]} {value}" if name in words else value


def _draw_roofs(axes: Any, roofs: dict[str, float], speeds: Sequence[float]) -> None:
    """Those near enough to be of interest; the others would squeeze the curves."""
    low, high = min(speeds), max(speeds)
    shown = {name: y for name, y in roofs.items() if 0.25 * low <= y <= 4 * high}
    for name, y in shown.items():
        axes.axhline(y, color="#9aa5ad", linewidth=1, linestyle=(0, (5, 3)), zorder=0)
        axes.annotate(
            f"roof: all experts from {name}, {y:.3g} tokens/s",
            (1, y), xycoords=("axes fraction", "data"),
            xytext=(-4, 3), textcoords="offset points", ha="right", fontsize=8, color="#5b6770",
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.5},
        )  # fmt: skip
    axes.set_yscale("log")
    axes.set_ylim(0.8 * min([low, *shown.values()]), 1.35 * max([high, *shown.values()]))


def _dress(axes: Any, axis: str, xs: Sequence[float]) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator

    axes.set_xlabel(LABELS[axis])
    axes.set_ylabel("tokens per second")
    ticks = sorted(set(xs))
    if len(ticks) <= 14:
        axes.set_xticks(ticks)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    plain = FuncFormatter(lambda y, _: f"{y:g}")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(plain)
    axes.yaxis.set_minor_formatter(FuncFormatter(lambda y, _: ""))
    right = axes.secondary_yaxis("right", functions=(_inverse, _inverse))
    right.set_ylabel("milliseconds per token")
    right.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    right.yaxis.set_major_formatter(plain)
    right.yaxis.set_minor_formatter(FuncFormatter(lambda y, _: ""))
    axes.grid(axis="y", color="#e3e7ea", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top",):
        axes.spines[side].set_visible(False)


def _inverse(values: Any) -> Any:
    """Tokens per second to milliseconds per token, and back."""
    import numpy as np

    return 1000 / np.maximum(values, 1e-9)
