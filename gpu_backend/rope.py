"""Rotary position embedding: https://arxiv.org/abs/2104.09864."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch


class RopeTable:
    """`rope` has the attributes of tiered.config.RopeConfig."""

    def __init__(self, rope: Any, head_dim: int) -> None:
        self.dim = rope.dim or head_dim
        if self.dim % 2 or self.dim > head_dim:
            raise ValueError(f"rope rotates {self.dim} of {head_dim} values; must be even, no more")
        if rope.pairs not in ("half", "adjacent"):
            raise ValueError(f"rope pairs must be half or adjacent, not {rope.pairs!r}")
        self.pairs: str = rope.pairs
        self._magnitude = float(rope.magnitude)
        self._frequency = float(rope.theta) ** (-np.arange(self.dim // 2) * 2.0 / self.dim)
        if len(rope.inv_freq_scale):
            self._frequency = self._frequency / np.asarray(rope.inv_freq_scale, np.float64)

    def rotation(self, positions: np.ndarray) -> np.ndarray:
        """cos and sin of every position's angles: float32 [num_tokens, 2, 1, dim / 2]."""
        angle = np.asarray(positions)[:, None, None] * self._frequency  # float64
        both = np.stack([np.cos(angle), np.sin(angle)], 1) * self._magnitude
        return both.astype(np.float32)

    def rotate(self, x: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
        """x: [num_tokens, heads, head_dim]; `rotation` is on its device."""
        cos, sin = rotation.unbind(1)
        rotated, rest = x[..., : self.dim], x[..., self.dim :]
        if self.pairs == "half":
            a, b = rotated.chunk(2, -1)
            return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], -1)
        a, b = rotated[..., 0::2], rotated[..., 1::2]
        rotated = torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)
        return torch.cat([rotated, rest], -1)
