"""How quantized matrices lie in GPU memory: a block's parts in planes, so that loads are wide.

ggml's blocks of 18, 20, 34 or 210 bytes put weights at addresses that no 128-bit load can read. On
the GPU, such a matrix is kept as planes: of all its blocks, first the part of the weights, then the
next part, and so on. The bytes are the same, so a matrix takes exactly the room it takes in a blob.
K formats of 144 and 176 bytes are multiples of 16 and stay as they are.
"""

from __future__ import annotations

from typing import NamedTuple

from cpu_kernels.formats import FORMATS

GROUP = 32  # weights that share a scale, and values that are quantized together
CHUNK = 256  # weights that kernels work on at a time
GROUPS = CHUNK // GROUP


class Part(NamedTuple):
    """A run of bytes inside a block."""

    offset: int
    nbytes: int


# Widest parts first: every plane then starts at a multiple of what is loaded from it.
PLANES: dict[str, tuple[Part, ...]] = {
    "q4_0": (Part(2, 16), Part(0, 2)),
    "q4_1": (Part(4, 16), Part(0, 4)),
    "q8_0": (Part(2, 32), Part(0, 2)),
    "q6_k": (Part(0, 128), Part(128, 64), Part(192, 16), Part(208, 2)),
}
QUANTIZED = ("q4_0", "q4_1", "q8_0", "q4_k", "q5_k", "q6_k")


def parts_of(format: str) -> tuple[Part, ...]:
    """The planes of a format; one part, the whole block, if it is kept as it is."""
    return PLANES.get(format, (Part(0, FORMATS[format].block_bytes),))


def plane_offsets(format: str, num_blocks: int) -> list[int]:
    """Byte offset of each plane of a matrix of `num_blocks` blocks."""
    offsets, at = [], 0
    for part in parts_of(format):
        offsets.append(at)
        at += num_blocks * part.nbytes
    return offsets


def check_format(format: str) -> None:
    if format not in QUANTIZED:
        raise ValueError(
            f"no GPU kernel knows the number format {format!r} (they know {', '.join(QUANTIZED)}); "
            "float experts run on a GPU as 4-bit integers: quantize='int4'"
        )
