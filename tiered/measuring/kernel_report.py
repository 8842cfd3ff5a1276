"""The kernels' speed on this machine, beside other libraries' where they are installed."""

from __future__ import annotations

from typing import Any

from tiered.backend import bench_gpu, default_threads
from tiered.measuring.layer_rates import layer_rates
from tiered.measuring.peers import Progress, dense_rates, rates_apart
from tiered.measuring.this_machine import processor_name
from tiered.version import __version__


def kernel_report(threads: int | None, progress: Progress) -> dict[str, Any]:
    """Rates of all formats with one thread and with `threads`, of layers and the peers with all."""
    from cpu_kernels import isa
    from cpu_kernels.bandwidth import read_bandwidth
    from cpu_kernels.bench import SHAPES, kernel_rates
    from cpu_kernels.formats import FORMATS
    from cpu_kernels.peak import product_peak

    counts = sorted({1, threads or default_threads()})
    kernels = list(kernel_rates(list(FORMATS), counts, progress))
    peaks = {count: product_peak(count) for count in counts}
    for row in kernels:
        if "gops" in row:
            row["peak_gops"] = peaks[row["threads"]] / 1e9
            row["of_peak"] = row["gops"] / row["peak_gops"]
    progress("numpy and torch", 1, 1)
    bandwidth = read_bandwidth(counts[-1])
    layers = list(layer_rates(counts[-1], bandwidth, progress))
    peers = [row for shape in SHAPES for row in dense_rates(shape)]
    others, notes = rates_apart(counts[-1], progress)
    return {
        "tiered": __version__,
        "processor": processor_name(),
        "isa": isa.choose("auto").name,
        "kernels": kernels,
        "layers": layers,
        "peers": peers + others,
        "notes": notes,
    }


def card_report(device: str, progress: Progress) -> dict[str, Any]:
    """Rates of all formats on a GPU. RuntimeError: there is none, or something is missing."""
    rows = bench_gpu(device, progress)
    return {"tiered": __version__, **rows, "layers": [], "peers": [], "notes": []}


def most_threads(report: dict[str, Any]) -> int:
    """Of the rows of a report; 0: it is a GPU's."""
    return max(int(row.get("threads", 0)) for row in report["kernels"])


def side_by_side(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Each of our rows, with those of the peers of the same format, shape and rows behind it."""
    threads = most_threads(report)
    rows = []
    for row in report["kernels"]:
        rows.append(row)
        if row.get("threads", 0) == threads:
            rows += [
                peer for peer in report["peers"]
                if (peer["beside"], peer["shape"], peer["rows"])
                == (row["format"], row["shape"], row["rows"])
            ]  # fmt: skip
    return rows
