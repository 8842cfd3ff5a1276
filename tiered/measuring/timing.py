"""Rates of products, as rows of a kernel report."""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter
from typing import Any

NUM_ROWS = 1, 128, 512  # decode, and prefill
REPEATS = 3


def best_seconds(calls: list[Callable[[], Any]]) -> float:
    """The best time of running all calls, one after the other."""
    best = float("inf")
    for _ in range(REPEATS):
        start = perf_counter()
        for call in calls:
            call()
        best = min(best, perf_counter() - start)
    return best


def rate(
    name: str,
    beside: str,
    shape: tuple[int, int],
    threads: int | str,
    num_rows: int,
    nbytes: int,
    seconds: float,
) -> dict[str, Any]:
    """One product of `num_rows` rows with a matrix of `nbytes` took `seconds`: GB/s of weights for
    one row, GOPS for more. `beside` is the format of ours that it is printed beside."""
    row: dict[str, Any] = {
        "format": name, "beside": beside, "shape": list(shape), "threads": threads,
        "rows": num_rows,
    }  # fmt: skip
    if num_rows == 1:
        row["gb_s"] = nbytes / seconds / 1e9
    else:
        row["gops"] = 2.0 * num_rows * shape[0] * shape[1] / seconds / 1e9
    return row
