"""Threads that share a layer's experts."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

from threadpoolctl import threadpool_limits


@contextmanager
def expert_threads(count: int) -> Iterator[ThreadPoolExecutor]:
    """Each computes its matrix products alone: the threads that NumPy's BLAS would start for each
    of them would only wait for each other."""
    with threadpool_limits(1, user_api="blas"), ThreadPoolExecutor(count, "tiered-experts") as pool:
        yield pool
