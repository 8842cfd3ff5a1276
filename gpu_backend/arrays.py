"""What the functions of `reference` and `launch` take: quantized matrices and activations."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch


class Activations(NamedTuple):
    """Rows as the kernels want them: int8 in groups of 32.

    The four planes of `factors` are each group's scale, and the scale times the sum of the group,
    of its first half and of its second half.
    """

    values: torch.Tensor  # int8 [M, K]
    factors: torch.Tensor  # float32 [4, M, K / 32]


class Quantized(NamedTuple):
    """A quantized matrix whose bytes are in planes (see gpu_backend.formats)."""

    data: torch.Tensor  # uint8, starts at a multiple of 16
    format: str
    shape: tuple[int, int]  # [out_features, in_features]


class Jobs(NamedTuple):
    """(token, expert) pairs by expert, on the host: expert i, which begins `begins[i]` bytes into
    the slab, computes pairs[starts[i]:starts[i + 1]]; pair `token * top_k + rank`."""

    begins: np.ndarray  # int64 [num_used]
    owners: np.ndarray  # int32 [num_used]: which of the layer's experts each is
    starts: np.ndarray  # int32 [num_used + 1]
    pairs: np.ndarray  # int32 [num_pairs]
    top_k: int

    @property
    def counts(self) -> np.ndarray:
        """Pairs of each expert: int32 [num_used]."""
        counts: np.ndarray = self.starts[1:] - self.starts[:-1]
        return counts
