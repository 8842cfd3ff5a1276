"""Rotary position embedding: https://arxiv.org/abs/2104.09864.

The angle of a position is that of the multiple of 256 below it plus that of the rest, so two small
tables of cosines and sines, made in float64, serve for any context, and no kernel needs a cosine.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from cpu_kernels.compiler import inner
from cpu_kernels.lanes import LANES
from cpu_kernels.simd import emitted, f32

STRIDE = 256  # positions between entries of the coarse table


class RopeTable:
    """Cosines and sines for positions below `num_positions`, which grows with `reserve`.

    `rope` has the attributes of tiered.config.RopeConfig. Rows have `half` values each, padded to
    whole vectors.
    """

    def __init__(self, rope: Any, head_dim: int, num_positions: int) -> None:
        self.dim = rope.dim or head_dim
        if self.dim % 2 or self.dim > head_dim:
            raise ValueError(f"rope rotates {self.dim} of {head_dim} values; must be even, no more")
        if rope.pairs not in ("half", "adjacent"):
            raise ValueError(f"rope pairs must be half or adjacent, not {rope.pairs!r}")
        self.half = self.dim // 2
        self.pairs: str = rope.pairs
        frequency = float(rope.theta) ** (-np.arange(self.half) * 2.0 / self.dim)
        if len(rope.inv_freq_scale):
            frequency = frequency / np.asarray(rope.inv_freq_scale, np.float64)
        self._frequency = np.zeros(-(-self.half // LANES) * LANES)
        self._frequency[: self.half] = frequency
        self.fine = self._rows(np.arange(STRIDE), float(rope.magnitude))
        self.coarse = self._rows(np.zeros(0), 1.0)
        self.reserve(num_positions)

    @property
    def num_positions(self) -> int:
        return len(self.coarse) * STRIDE

    def reserve(self, num_positions: int) -> None:
        if num_positions > self.num_positions:
            num_rows = max(2 * len(self.coarse), -(-num_positions // STRIDE))
            self.coarse = self._rows(np.arange(num_rows) * STRIDE, 1.0)

    def _rows(self, positions: np.ndarray, magnitude: float) -> np.ndarray:
        angle = positions[:, None] * self._frequency
        rows = np.stack([np.cos(angle), np.sin(angle)], 1) * magnitude
        return rows.astype(np.float32)  # [num_rows, 2, half (padded)]


@emitted("void", "i64 i64 i64 i64")
def _add_angles(k, a, b, out, row):
    """Rows of cosines, then sines `row` bytes further, of the sum of two rows' angles."""
    with k.loop(row >> 6) as v:
        at = v * (4 * LANES)
        cos_a, sin_a = (k.load(a + at + row * i, f32(LANES), align=4) for i in (0, 1))
        cos_b, sin_b = (k.load(b + at + row * i, f32(LANES), align=4) for i in (0, 1))
        k.store(out + at, cos_a * cos_b - sin_a * sin_b, align=4)
        k.store(out + at + row, sin_a * cos_b + cos_a * sin_b, align=4)


@inner
def rotation(coarse, fine, half, position, out):
    """Write the cosines of a position to `out`, and after them (padded) the sines."""
    row = (half + LANES - 1) // LANES * LANES * 4
    _add_angles(coarse + position // STRIDE * 2 * row, fine + position % STRIDE * 2 * row, out, row)


@emitted("void", "i64 i64 i64")
def rotate_half(k, x, angles, half):
    """Rotate the pairs (i, i + half) of the float32 at x."""
    _rotate(k, x, angles, half, adjacent=False)


@emitted("void", "i64 i64 i64")
def rotate_adjacent(k, x, angles, half):
    """Rotate the pairs (2i, 2i + 1) of the float32 at x."""
    _rotate(k, x, angles, half, adjacent=True)


def _rotate(k, x, angles, half, adjacent):
    padded_bytes = ((half + (LANES - 1)) >> 4) * (4 * LANES)

    def rotate_pairs(first, lanes):
        cosine = k.load(angles + first * 4, f32(lanes), align=4)
        sine = k.load(angles + padded_bytes + first * 4, f32(lanes), align=4)
        a_at = x + first * (8 if adjacent else 4)
        b_at = a_at + 4 * lanes if adjacent else a_at + half * 4
        a, b = (k.load(at, f32(lanes), align=4) for at in (a_at, b_at))
        interleaved = adjacent and lanes > 1
        if interleaved:
            a, b = (k.shuffle(a, b, range(start, 2 * lanes, 2)) for start in (0, 1))
        a, b = a * cosine - b * sine, b * cosine + a * sine
        if interleaved:
            order = [i // 2 + lanes * (i % 2) for i in range(2 * lanes)]
            a, b = k.shuffle(a, b, order[:lanes]), k.shuffle(a, b, order[lanes:])
        k.store(a_at, a, align=4)
        k.store(b_at, b, align=4)

    num_vectors = half >> 4
    with k.loop(num_vectors) as v:
        rotate_pairs(v * LANES, LANES)
    with k.loop(half - num_vectors * LANES) as i:
        rotate_pairs(num_vectors * LANES + i, 1)
