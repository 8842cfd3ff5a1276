"""How long the host takes for an expert with some rows of activations, tried on one that is all
zeros."""

from __future__ import annotations

from statistics import median
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np

ALIGNMENT = 4096
REPEATS = 3


class Jobs(NamedTuple):
    """One expert's, as tiered.experts.ExpertJobs."""

    experts: np.ndarray
    starts: np.ndarray
    pairs: np.ndarray


def expert_seconds(host: Any, layer: Any, layout: Any, num_rows: int) -> float:
    """`host` is a CpuBackend, and `layer` what it made of `layout`."""
    memory = np.zeros(layout.nbytes + ALIGNMENT, np.uint8)
    begin = -memory.ctypes.data % ALIGNMENT + memory.ctypes.data
    addresses = (begin + layout.offsets)[None]
    jobs = Jobs(
        np.zeros(1, np.int32),
        np.array([0, num_rows], np.int32),
        np.arange(num_rows, dtype=np.int32),
    )
    h = np.ones((num_rows, layout.gate.shape[1]), np.float32)
    out = np.empty((num_rows, layout.down.shape[0]), np.float32)
    seconds = []
    for _ in range(REPEATS + 1):  # the first time, kernels are compiled and pages are touched
        start = perf_counter()
        host.experts(h, layer, addresses, jobs, out)
        seconds.append(perf_counter() - start)
    return median(seconds[1:])
