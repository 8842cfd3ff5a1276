"""The kernels' speed on this machine, beside numpy and torch where they are installed."""

from __future__ import annotations

import platform
from collections.abc import Callable
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from time import perf_counter
from typing import Any

import numpy as np

from tiered.backend import default_threads
from tiered.version import __version__

Progress = Callable[[str, int, int], None]


def kernel_report(threads: int | None, progress: Progress) -> dict[str, Any]:
    """Rates of all formats with one thread and with `threads`, and of the peers with all."""
    from cpu_kernels import isa
    from cpu_kernels.bench import SHAPES, kernel_rates
    from cpu_kernels.formats import FORMATS
    from cpu_kernels.peak import integer_peak

    counts = sorted({1, threads or default_threads()})
    kernels = list(kernel_rates(list(FORMATS), counts, progress=progress))
    peaks = {count: integer_peak(count) for count in counts}
    for row in kernels:
        if "gops" in row:
            row["peak_gops"] = peaks[row["threads"]] / 1e9
            row["of_peak"] = row["gops"] / row["peak_gops"]
    progress("numpy and torch", 1, 1)
    return {
        "tiered": __version__,
        "processor": platform.processor() or platform.machine(),
        "isa": isa.choose("auto").name,
        "kernels": kernels,
        "peers": [row for shape in SHAPES for row in peer_rates(shape)],
    }


def peer_rates(shape: tuple[int, int]) -> list[dict[str, Any]]:
    """float32 (and torch's bfloat16) products of the same shape, with the library's own threads."""
    rows = []
    for num_rows in (1, 128):
        x = np.ones((num_rows, shape[1]), np.float32)
        weights = [
            np.ones(shape, np.float32)
            for _ in range(max(1, (256 << 20) // (4 * shape[0] * shape[1])))
        ]
        seconds = best_seconds([partial(np.matmul, x, w.T) for w in weights])
        rows.append(rate("numpy f32", shape, num_rows, 4, seconds / len(weights)))
        if find_spec("torch") is None:
            continue
        torch = import_module("torch")  # control has no need of it: it is only measured here
        for dtype, nbytes in ((torch.float32, 4), (torch.bfloat16, 2)):
            tensor = torch.from_numpy(x).to(dtype)
            many = [torch.from_numpy(w).to(dtype) for w in weights]
            with torch.inference_mode():
                seconds = best_seconds([partial(torch.matmul, tensor, w.T) for w in many])
            name = f"torch {str(dtype).removeprefix('torch.')}"
            rows.append(rate(name, shape, num_rows, nbytes, seconds / len(many)))
    return rows


def best_seconds(calls: list[Callable[[], Any]], repeats: int = 3) -> float:
    """The best time of running all calls, one after the other."""
    best = float("inf")
    for _ in range(repeats):
        start = perf_counter()
        for call in calls:
            call()
        best = min(best, perf_counter() - start)
    return best


def rate(
    name: str, shape: tuple[int, int], num_rows: int, nbytes: int, seconds: float
) -> dict[str, Any]:
    size = shape[0] * shape[1]
    row: dict[str, Any] = {"format": name, "shape": list(shape), "threads": "all", "rows": num_rows}
    if num_rows == 1:
        row["gb_s"] = nbytes * size / seconds / 1e9
    else:
        row["gops"] = 2.0 * num_rows * size / seconds / 1e9
    return row
