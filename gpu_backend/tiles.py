"""Tiles: an expert's pairs in pieces of a fixed size, for kernels that compute many at once."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from gpu_backend.arrays import Activations, Jobs


class Tiles(NamedTuple):
    """Tile t computes pairs first[t] ... first[t] + count[t] - 1 (places in Jobs.pairs)."""

    begins: torch.Tensor  # int64 [num_tiles]: where the expert begins in the slab
    owners: torch.Tensor  # int32 [num_tiles]: which of the layer's experts it is
    first: torch.Tensor  # int32 [num_tiles]
    count: torch.Tensor  # int32 [num_tiles]


def tiles_of(jobs: Jobs, size: int, device: torch.device | str) -> Tiles:
    """Pieces of at most `size` pairs; the pairs of one expert next to each other, so that its
    weights are read while they are in the cache."""
    num_tiles = -(-jobs.counts // size)  # of each expert
    owner = np.repeat(np.arange(len(jobs.begins)), num_tiles)
    place = np.arange(len(owner)) - np.repeat(np.cumsum(num_tiles) - num_tiles, num_tiles)
    first = jobs.starts[:-1][owner] + place * size
    count = np.minimum(jobs.starts[1:][owner] - first, size)
    return Tiles(
        *(
            torch.from_numpy(array.astype(dtype)).to(device, non_blocking=True)
            for array, dtype in (
                (jobs.begins[owner], np.int64),
                (jobs.owners[owner], np.int32),
                (first, np.int32),
                (count, np.int32),
            )
        )
    )


def one_matrix(a: Activations, size: int) -> Tiles:
    """All rows of activations times one matrix that begins at 0."""
    num_rows = len(a.values)
    starts = np.array([0, num_rows], np.int32)
    pairs = np.arange(num_rows, dtype=np.int32)
    jobs = Jobs(np.zeros(1, np.int64), np.zeros(1, np.int32), starts, pairs, 1)
    return tiles_of(jobs, size, a.values.device)
