"""Jobs of the host in pieces of few rows: so many get the bits that the device would give them."""

from __future__ import annotations

from typing import Any

import numpy as np


def in_pieces(addresses: np.ndarray, jobs: Any, most: int) -> tuple[np.ndarray, Any]:
    """The same jobs (tiered's, or like them) with at most `most` rows each; `addresses`, of each
    job's expert, are repeated with it."""
    counts = np.diff(jobs.starts)
    if len(counts) == 0 or counts.max() <= most:
        return addresses, jobs
    pieces = -(-counts // most)
    owners = np.repeat(np.arange(len(counts)), pieces)
    number = np.arange(len(owners)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    starts = np.append(jobs.starts[:-1][owners] + number * most, jobs.starts[-1])
    experts = np.asarray(jobs.experts)[owners]
    return addresses[owners], jobs._replace(experts=experts, starts=starts.astype(np.int32))
