"""How quantized matrices lie in GPU memory: a block's parts in planes, so that loads are wide.

ggml's blocks of 17, 18, 34 or 210 bytes put weights at addresses that no 128-bit load can read. On
the GPU, a matrix is kept as planes: of all its blocks, first the part of the lower bits, then the
next part, and so on. The bytes are the same, so a matrix takes exactly the room it takes in a blob.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from cpu_kernels.formats import NF4

GROUP = 32  # weights that share a scale, and values that are quantized together
CHUNK = 256  # weights that kernels work on at a time
GROUPS = CHUNK // GROUP


class Part(NamedTuple):
    """A run of bytes inside a block."""

    offset: int
    nbytes: int


class Layout(NamedTuple):
    """What the bytes of a format stand for: see cpu_kernels.groups.Layout.

    A group's lower bits are in 16 bytes, whose upper halves are its second half (`is_split`), or in
    32 bytes; `sharing` groups have theirs in the same bytes, or, with `runs`, in so many runs of 32
    bytes. Higher bits are in 32 bytes for 8 / high_bits groups, or, with `single_bits`, in 4 bytes
    for each.
    """

    low: Part
    scales: str  # how they are stored: see gpu_backend.kernels.factors
    scale_parts: tuple[Part, ...]
    offset_factor: float = 0.0  # of what is added to integers; 0: nothing is
    low_bits: int = 4
    is_split: bool = False
    sharing: int = 1
    runs: int = 1
    high: Part | None = None
    high_bits: int = 0
    single_bits: bool = False
    num_scales: int = 1  # of a group: two where its halves differ
    table: tuple[int, ...] = ()  # what the bits stand for, where that is no number
    signed: bool = False

    @property
    def parts(self) -> tuple[Part, ...]:
        """In the order of the planes. Widest first: each starts at a multiple of what is loaded."""
        return (self.low, *([self.high] if self.high else []), *self.scale_parts)


# ggml-common.h's kvalues_iq4nl, and the values of E2M1 doubled, plus 12: see cpu_kernels.groups.
IQ4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
E2M1 = tuple(12 + sign * value for sign in (1, -1) for value in (0, 1, 2, 3, 4, 6, 8, 12))


def _blocks(
    low: int, scales: str, scale_bytes: int, factor: float, groups: int = 1, **others: Any
) -> Layout:
    """Blocks of so many groups: scales first, lower bits in 16 bytes for each from `low` on."""
    parts = (Part(0, scale_bytes),)
    return Layout(Part(low, 16 * groups), scales, parts, factor, is_split=True, **others)


LAYOUTS = {
    "q4_0": _blocks(2, "half", 2, -8.0),
    "q4_1": _blocks(4, "minimum", 4, 1.0),
    "q5_0": _blocks(6, "half", 2, -16.0, high=Part(2, 4), high_bits=1, single_bits=True),
    "q5_1": _blocks(8, "minimum", 4, 1.0, high=Part(4, 4), high_bits=1, single_bits=True),
    "q8_0": Layout(Part(2, 32), "half", (Part(0, 2),), low_bits=8, signed=True),
    "iq4_nl": _blocks(2, "half", 2, 0.0, table=IQ4, signed=True),
    "mxfp4": _blocks(1, "power", 1, -12.0, table=E2M1),
    "int4_g128": _blocks(4, "zero", 4, -1.0, groups=4),
    "nf4": _blocks(2, "half", 2, 0.0, groups=2, table=NF4, signed=True),
    "iq4_xs": Layout(Part(8, 128), "iq4_xs", (Part(0, 8),), is_split=True, table=IQ4, signed=True),
    "q2_k": Layout(
        Part(16, 64), "q2_k", (Part(0, 16), Part(80, 4)), -1.0, 2, sharing=4, num_scales=2
    ),
    "q3_k": Layout(
        Part(32, 64), "q3_k", (Part(96, 12), Part(108, 2)), -4.0, 2, sharing=4, num_scales=2,
        high=Part(0, 32), high_bits=1,
    ),
    "q4_k": Layout(Part(16, 128), "six_bits", (Part(0, 16),), -1.0, sharing=2),
    "q5_k": Layout(
        Part(48, 128), "six_bits", (Part(0, 16),), -1.0, sharing=2, high=Part(16, 32), high_bits=1
    ),
    "q6_k": Layout(
        Part(0, 128), "q6_k", (Part(192, 16), Part(208, 2)), -32.0, sharing=4, runs=2,
        high=Part(128, 64), high_bits=2, num_scales=2,
    ),
}  # fmt: skip
QUANTIZED = tuple(LAYOUTS)


def parts_of(format: str) -> tuple[Part, ...]:
    """The planes of a format."""
    return LAYOUTS[format].parts


def plane_offsets(format: str, num_blocks: int) -> list[int]:
    """Byte offset of each plane of a matrix of `num_blocks` blocks."""
    offsets, at = [], 0
    for part in parts_of(format):
        offsets.append(at)
        at += num_blocks * part.nbytes
    return offsets


def check_format(format: str) -> None:
    if format not in LAYOUTS:
        raise ValueError(
            f"no GPU kernel knows the number format {format!r} (they know {', '.join(QUANTIZED)}); "
            "float experts run on a GPU as 4-bit integers: quantize='int4'"
        )
