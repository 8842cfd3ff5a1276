"""Quantize activations: int8 in groups of 32 with a scale of 11 bits, as the CPU does."""

from __future__ import annotations

import triton
import triton.language as tl

from gpu_backend.kernels.exact import round_even


@triton.jit
def quantize_kernel(x, values, factors, plane, G, GROUPS: tl.constexpr):
    """Row program_id(0), groups program_id(1) * GROUPS and on.

    x: float32 [M, 32 * G]; values: int8, the same shape; factors: float32 [4, M, G], `plane` values
    apart: scale, and scale times the sum of the group, of its first half, of its second half.
    """
    row = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    known = group < G
    half = tl.arange(0, 16)
    at = row * G * 32 + (group * 32)[:, None] + half[None, :]
    first = tl.load(x + at, mask=known[:, None], other=0.0)  # [groups, 16]
    second = tl.load(x + at + 16, mask=known[:, None], other=0.0)
    largest = tl.maximum(tl.max(tl.abs(first), axis=1), tl.max(tl.abs(second), axis=1))
    # Below 1e-35 its inverse might be infinite: such a group counts as zero.
    tiny = largest < 1e-35
    scale = tl.div_rn(largest, tl.full(largest.shape, 127.0, tl.float32))
    scale = tl.where(tiny, 0.0, to_11_bits(scale))
    divisor = tl.where(tiny, 1.0, largest)
    inverse = tl.where(tiny, 0.0, tl.div_rn(tl.full(divisor.shape, 127.0, tl.float32), divisor))
    first = rounded(first * inverse[:, None])
    second = rounded(second * inverse[:, None])
    tl.store(values + at, first.to(tl.int8), mask=known[:, None])
    tl.store(values + at + 16, second.to(tl.int8), mask=known[:, None])
    sum_1 = tl.sum(first, axis=1).to(tl.float32)
    sum_2 = tl.sum(second, axis=1).to(tl.float32)
    at_factor = factors + row * G + group
    tl.store(at_factor, scale, mask=known)
    tl.store(at_factor + plane, (sum_1 + sum_2) * scale, mask=known)
    tl.store(at_factor + 2 * plane, sum_1 * scale, mask=known)
    tl.store(at_factor + 3 * plane, sum_2 * scale, mask=known)


@triton.jit
def to_11_bits(scale):
    """The nearest number with as many significant bits as a float16 has; NaN stays NaN."""
    bits = scale.to(tl.int32, bitcast=True)
    nearest = (bits + 0xFFF + ((bits >> 13) & 1)) & -0x2000
    return tl.where(bits > 0x7F800000, bits, nearest).to(tl.float32, bitcast=True)


@triton.jit
def rounded(x):
    """To int32 in -127 ... 127; what is no number becomes 127."""
    r = round_even(x)
    r = tl.where(r < 127.0, r, 127.0)
    return tl.where(r > -127.0, r, -127.0).to(tl.int32)
