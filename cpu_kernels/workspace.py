"""Memory for intermediate results of experts, made once and grown when a larger batch comes."""

from __future__ import annotations

from functools import partial

import numpy as np

from cpu_kernels.activations import prepared_bytes
from cpu_kernels.linear import FEW_ROWS
from cpu_kernels.memory import aligned_bytes

ROOM_STEP = 64  # rows


def room_for(num_rows: int) -> int:
    """How many rows to have room for where so many come: that a few more move nothing."""
    return FEW_ROWS if num_rows <= FEW_ROWS else -(-num_rows // ROOM_STEP) * ROOM_STEP


def _grow(arrays: dict[str, np.ndarray], name: str, nbytes: int) -> None:
    if name not in arrays or arrays[name].nbytes < nbytes:
        arrays.pop(name, None)  # the old one is given back first
        arrays[name] = aligned_bytes(nbytes)


class Workspace:
    """Arrays by name, large enough for what was reserved: `arrays` are those of the EXPERTS record,
    `dense` those that a feed-forward needs besides."""

    def __init__(self) -> None:
        self.arrays: dict[str, np.ndarray] = {}
        self.dense: dict[str, np.ndarray] = {}
        self.version = 0  # changes whenever an array is replaced
        # Whose values are in the arrays of these names: a token's experts have one pair each, in
        # every layer.
        self.starts: np.ndarray | None = None
        self.pairs: np.ndarray | None = None
        self._reserved = (0, 0, 0)

    def reserve(
        self, num_rows: int, hidden_size: int, num_pairs: int, expert_size: int, num_jobs: int = 1
    ) -> None:
        prepared = prepared_bytes(num_rows, hidden_size)
        inner = max(4 * num_pairs * expert_size, prepared_bytes(num_pairs, expert_size))
        size = prepared, inner, max(num_pairs, num_jobs + 1)
        if all(new <= old for new, old in zip(size, self._reserved, strict=True)):
            return
        prepared, inner, count = map(max, size, self._reserved)
        grow = partial(_grow, self.arrays)
        grow("prepared", prepared)
        for name in ("inner_prepared", "gate_out", "up_out"):
            grow(name, inner)
        if count > self._reserved[2]:
            count *= 2
            for name in ("starts", "pairs", "experts"):
                self.arrays[name] = np.zeros(count, np.int32)
            self.arrays["identity"] = np.arange(count, dtype=np.int32)
            self.arrays["addresses"] = np.zeros((count, 3), np.int64)
            self.starts = self.pairs = None
        self._reserved = prepared, inner, count
        self.version += 1

    def place(self, starts: np.ndarray, pairs: np.ndarray) -> None:
        self.arrays["starts"][: len(starts)] = starts
        self.arrays["pairs"][: len(pairs)] = pairs
        self.starts, self.pairs = starts, pairs

    def reserve_dense(self, num_rows: int, hidden_size: int) -> None:
        before = self.dense.copy()
        _grow(self.dense, "h", 4 * num_rows * hidden_size)
        _grow(self.dense, "out", 4 * num_rows * hidden_size)
        _grow(self.dense, "scores", 4 * num_rows)
        if any(self.dense[name] is not before.get(name) for name in self.dense):
            self.version += 1

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in (*self.arrays.values(), *self.dense.values()))
