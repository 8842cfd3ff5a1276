"""The number formats of weights: how many values make a block, and how many bytes a block takes.

Names are ggml's in lower case, because the bytes are ggml's: a row of a matrix is a run of blocks
along its input features, and rows follow each other without padding. Nothing here imports numba.
"""

from __future__ import annotations

from typing import NamedTuple


class Format(NamedTuple):
    """`block_size` values are stored in `block_bytes` bytes."""

    name: str
    block_size: int
    block_bytes: int

    @property
    def bits(self) -> float:
        """Bits per weight, scales included."""
        return 8 * self.block_bytes / self.block_size

    @property
    def is_float(self) -> bool:
        """Plain floating-point values: computed with float32 activations, never quantized ones."""
        return self.block_size == 1

    def row_bytes(self, num_values: int) -> int:
        if num_values % self.block_size:
            raise ValueError(
                f"a row of {num_values} values is no whole number of {self.name} blocks "
                f"({self.block_size} values each)"
            )
        return num_values // self.block_size * self.block_bytes


FORMATS: dict[str, Format] = {
    f.name: f
    for f in (
        Format("f32", 1, 4),
        Format("f16", 1, 2),
        Format("bf16", 1, 2),
        Format("q8_0", 32, 34),
        Format("q4_0", 32, 18),
        Format("q4_1", 32, 20),
        Format("q5_0", 32, 22),
        Format("q5_1", 32, 24),
        Format("iq4_nl", 32, 18),
        Format("mxfp4", 32, 17),
        Format("iq4_xs", 256, 136),
        Format("q2_k", 256, 84),
        Format("q3_k", 256, 110),
        Format("q4_k", 256, 144),
        Format("q5_k", 256, 176),
        Format("q6_k", 256, 210),
    )
}
