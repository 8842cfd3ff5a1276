"""A pass over a prompt: several chunks of it, layer by layer, that share each fetched expert.

Dense parts of a layer compute one chunk after the other, experts all of them together: a prompt of
four chunks reads each expert from disk once and not four times, and decodes its weights once.
What is computed has the bits that it would have chunk by chunk.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from tiered.backend import Array, Backend, Batch
from tiered.experts import ExpertJobs


class Chunks:
    """The tokens of a pass in chunks of `size`; 0, or no fewer than there are: one chunk."""

    def __init__(self, batch: Batch, size: int = 0) -> None:
        count = self.num_tokens = len(batch.tokens)
        self.positions = batch.positions
        self.size = min(size, count) or count
        self.rows = [slice(at, min(at + self.size, count)) for at in range(0, count, self.size)]
        self.batches = [batch]
        if len(self.rows) > 1:
            self.batches = [
                batch._replace(
                    tokens=batch.tokens[rows],
                    positions=batch.positions[rows],
                    sequences=batch.sequences[rows],
                )
                for rows in self.rows
            ]

    @property
    def is_one(self) -> bool:
        return len(self.rows) == 1

    def of(self, x: Array) -> list[Array]:
        """The rows of each chunk."""
        return [x] if self.is_one else [x[rows] for rows in self.rows]


def run_by_chunk(
    backend: Backend,
    h: Array,
    layer: Any,
    addresses: np.ndarray,
    jobs: ExpertJobs,
    out: Array,
    num_tokens: int,
    size: int,
) -> None:
    """Backend.experts for `num_tokens` tokens that came in chunks of `size`."""
    if num_tokens <= size:
        backend.experts(h, layer, addresses, jobs, out)
        return
    top_k = len(out) // num_tokens
    for some, at in jobs_by_chunk(jobs, addresses, top_k, size, backend.few_rows):
        backend.experts(h, layer, at, some, out)


def jobs_by_chunk(
    jobs: ExpertJobs, addresses: np.ndarray, top_k: int, size: int, few_rows: int
) -> Iterator[tuple[ExpertJobs, np.ndarray]]:
    """The same jobs, so that each row gets the bits that it would have chunk by chunk, and a few at
    a time, so that they need no more memory than those of one chunk.

    Up to `few_rows` rows of a product get other bits than more do. So where a chunk has as few for
    an expert, these are a job of their own; all others of an expert are one. `addresses` (int64
    [num_jobs, 3]) are repeated with it.
    """
    chunks = jobs.pairs // (top_k * size)
    num_chunks = int(chunks.max(initial=0)) + 1
    owners = np.repeat(np.arange(len(jobs.experts)), np.diff(jobs.starts))
    of_chunk = owners * num_chunks + chunks
    is_few = (np.bincount(of_chunk) <= few_rows)[of_chunk]
    parts = owners * (num_chunks + 1) + np.where(is_few, chunks + 1, 0)
    counts = np.bincount(parts)
    used = np.flatnonzero(counts)
    most = max(top_k * size, 4 * few_rows)  # so that parts of a job are not few
    pieces = -(-counts[used] // most)
    starts = [
        start + np.arange(num) * count // num
        for start, count, num in zip(
            np.cumsum(counts[used]) - counts[used], counts[used], pieces, strict=True
        )
    ]
    ends = np.append(np.concatenate(starts), len(parts)).astype(np.int32)
    pairs = jobs.pairs[np.argsort(parts, kind="stable")]
    owners = np.repeat(used // (num_chunks + 1), pieces)
    first = 0
    while first < len(owners):
        last = int(np.searchsorted(ends, ends[first] + most, side="right")) - 1
        chosen, own = owners[first:last], pairs[ends[first] : ends[last]]
        yield (
            ExpertJobs(jobs.experts[chosen], ends[first : last + 1] - ends[first], own),
            addresses[chosen],
        )
        first = last
