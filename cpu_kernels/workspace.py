"""Memory for intermediate results of experts, made once and grown when a larger batch comes."""

from __future__ import annotations

from functools import partial

import numpy as np

from cpu_kernels.activations import prepared_bytes
from cpu_kernels.memory import aligned_bytes


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

    def reserve(self, num_rows: int, hidden_size: int, num_pairs: int, expert_size: int) -> None:
        grow = partial(_grow, self.arrays)
        grow("prepared", prepared_bytes(num_rows, hidden_size))
        grow("inner_prepared", prepared_bytes(num_pairs, expert_size))
        grow("gate_out", 4 * num_pairs * expert_size)
        grow("up_out", 4 * num_pairs * expert_size)
        if len(self.arrays.get("identity", ())) < num_pairs:
            self.arrays["identity"] = np.arange(2 * num_pairs, dtype=np.int32)

    def reserve_dense(self, num_rows: int, hidden_size: int) -> None:
        _grow(self.dense, "h", 4 * num_rows * hidden_size)
        _grow(self.dense, "out", 4 * num_rows * hidden_size)
        _grow(self.dense, "scores", 4 * num_rows)

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in (*self.arrays.values(), *self.dense.values()))
