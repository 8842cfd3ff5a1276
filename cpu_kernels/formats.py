"""The number formats of weights: how many values make a block, and how many bytes a block takes.

Names are ggml's in lower case, because the bytes are ggml's: a row of a matrix is a run of blocks
along its input features, and rows follow each other without padding. Two formats are ours:

    int4_g128   float16 scale, float16 zero, 64 bytes: scale * (integer - zero). What GPTQ and AWQ
                make, whose zeros are integers, is held exactly.
    nf4         float16 scale, 32 bytes: scale * NF4[code]: QLoRA's NormalFloat4
                (https://arxiv.org/abs/2305.14314).

Their bytes are those of a run of q4_0's: each 32 values in 16, the first half in the lower bits.
Nothing here imports numba.
"""

from __future__ import annotations

from typing import NamedTuple


class Format(NamedTuple):
    """`block_size` values are stored in `block_bytes` bytes."""

    name: str
    block_size: int
    block_bytes: int
    is_ggmls: bool = True  # GGUF files can have it

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


# QLoRA's values times 112: of all factors that make integers of 8 bits of them and keep -1 and 1,
# the one with the least error, 0.0017 of a block's largest value (root of the mean square; at most
# 0.0039).
NF4 = (-112, -78, -59, -44, -32, -21, -10, 0, 9, 18, 28, 38, 49, 63, 81, 112)

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
        Format("int4_g128", 128, 68, is_ggmls=False),
        Format("nf4", 64, 34, is_ggmls=False),
    )
}
