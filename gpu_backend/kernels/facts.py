"""What kernels know of a number format when they are compiled: gpu_backend.formats as constants."""

from __future__ import annotations

import triton
import triton.language as tl

from cpu_kernels.formats import FORMATS
from gpu_backend.formats import GROUP, LAYOUTS


@triton.constexpr_function
def fact(format, name):
    """A field of the format's Layout."""
    return getattr(LAYOUTS[format], name)


@triton.constexpr_function
def block_groups(format):
    """Groups of a block: 1 to 8."""
    return FORMATS[format].block_size // GROUP


@triton.constexpr_function
def has_offsets(format):
    return LAYOUTS[format].offset_factor != 0


@triton.constexpr_function
def has_table(format):
    return len(LAYOUTS[format].table) > 0


@triton.constexpr_function
def table_word(format, index):
    """Four of the table's sixteen bytes, as an int32."""
    data = bytes(value & 255 for value in LAYOUTS[format].table[4 * index : 4 * index + 4])
    return int.from_bytes(data, "little", signed=True)


@triton.constexpr_function
def mask_of(num_bits):
    """The lowest bits of each byte of an int32."""
    return 0x01010101 * ((1 << num_bits) - 1)


@triton.constexpr_function
def plane_at(format, index, n, k):
    """Where a plane begins in a matrix of n rows of k weights, in bytes. `index` counts from the
    lower bits' plane on; scales are the last ones, of which -1 is the last."""
    parts = LAYOUTS[format].parts
    return n * k // FORMATS[format].block_size * sum(p.nbytes for p in parts[:index])


@triton.jit
def first_group(chunk, K: tl.constexpr):
    """The group that a chunk begins with. Where a row is no whole number of chunks, the last one
    begins earlier, so that it ends with the row; what it has of the one before does not count."""
    SHIFT: tl.constexpr = (8 - K // 32 % 8) % 8
    LAST: tl.constexpr = (K + 255) // 256 - 1
    if SHIFT == 0:
        return chunk * 8
    elif LAST == 0:
        return chunk * 8 - SHIFT
    else:
        return chunk * 8 - SHIFT * (chunk // LAST)
