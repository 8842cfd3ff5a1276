"""The scales of a chunk's groups, and what is added to their integers: see cpu_kernels.scales.

Tensors are [rows, groups]; layouts are ggml's blocks after `gpu_backend.formats`. Groups that do
not count (see facts.first_group) read as zeros.
"""

from __future__ import annotations

import triton
import triton.language as tl

from gpu_backend.kernels.facts import block_groups, fact, first_group, plane_at


@triton.jit
def words(base, offset, index, mask):
    """int32 number `index` (any shape) of the words `offset` bytes after `base`."""
    pointers = (base + offset).to(tl.pointer_type(tl.int32)) + index
    return tl.load(pointers, mask=mask, other=0, eviction_policy="evict_first")


@triton.jit
def _halves(base, offset, index, mask):
    """The float16 number `index` of those `offset` bytes after `base`, as float32."""
    pointers = (base + offset).to(tl.pointer_type(tl.float16)) + index
    return tl.load(pointers, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _bytes(base, offset, index, mask):
    """The same of bytes, as int32 of 0 to 255."""
    return tl.load(base + offset + index, mask=mask, other=0).to(tl.int32)


@triton.jit
def factors(base, row, chunk, group, N: tl.constexpr, K: tl.constexpr, FORMAT: tl.constexpr):
    """float32 [rows, groups]: scales of first and second halves, and what their sums are
    multiplied with, where halves differ; or of whole groups (the second ones are then the same)."""
    G: tl.constexpr = K // 32
    KIND: tl.constexpr = fact(FORMAT, "scales")
    AT: tl.constexpr = plane_at(FORMAT, -1, N, K)  # the last plane
    first = first_group(chunk, K)
    inside = (row < N)[:, None] & ((first + group) >= chunk * 8)[None, :]
    row = row.to(tl.int64)
    PER: tl.constexpr = block_groups(FORMAT)
    index = ((row * G + first)[:, None] + group[None, :]) // PER  # of a block
    if KIND == "half":
        scale = _halves(base, AT, index, inside)
        return scale, scale, scale, scale
    elif KIND == "minimum":
        scale = _halves(base, AT, 2 * index, inside)
        return scale, scale, _halves(base, AT, 2 * index + 1, inside), scale
    elif KIND == "zero":
        scale = _halves(base, AT, 2 * index, inside)
        return scale, scale, scale * _halves(base, AT, 2 * index + 1, inside), scale
    elif KIND == "power":
        exponent = _bytes(base, AT, index, inside)
        bits = tl.where(exponent < 2, (exponent + 1) << 21, (exponent - 1) << 23)
        scale = tl.where(inside, bits.to(tl.float32, bitcast=True), 0.0)
        return scale, scale, scale, scale
    else:
        block = (row * (K // 256) + chunk)[:, None] + tl.zeros_like(group)[None, :]
        if KIND == "iq4_xs":
            return _iq4_xs(base + AT, block, group, inside)
        elif KIND == "six_bits":
            return _six_bits(base + AT, block, group, inside)
        else:
            BYTES: tl.constexpr = plane_at(FORMAT, -2, N, K)
            if KIND == "q2_k":
                return _q2_k(base, BYTES, AT, block, group, inside)
            elif KIND == "q3_k":
                return _q3_k(base, BYTES, AT, block, group, inside)
            else:
                tl.static_assert(KIND == "q6_k")
                return _q6_k(base, BYTES, AT, block, group, inside)


@triton.jit
def _iq4_xs(base, block, group, inside):
    """A factor, the upper 2 bits of eight scales in 2 bytes, the lower 4 in 4 bytes."""
    factor = _halves(base, 0, 4 * block, inside)
    high = words(base, 0, 2 * block, inside) >> 16
    low = words(base, 0, 2 * block + 1, inside)
    scale = (low >> (4 * group)[None, :]) & 15
    scale |= ((high >> (2 * group)[None, :]) & 3) << 4
    scale = (scale - 32).to(tl.float32) * factor
    return scale, scale, scale, scale


@triton.jit
def _q2_k(base, BYTES: tl.constexpr, AT: tl.constexpr, block, group, inside):
    """A byte for each half of a group: 4 bits of scale, 4 bits of minimum; two factors."""
    index = 16 * block + (2 * group)[None, :]
    first, second = _bytes(base, BYTES, index, inside), _bytes(base, BYTES, index + 1, inside)
    factor = _halves(base, AT, 2 * block, inside)
    factor_of_minimum = _halves(base, AT, 2 * block + 1, inside)
    return (
        (first & 15).to(tl.float32) * factor,
        (second & 15).to(tl.float32) * factor,
        (first >> 4).to(tl.float32) * factor_of_minimum,
        (second >> 4).to(tl.float32) * factor_of_minimum,
    )


@triton.jit
def _q3_k(base, BYTES: tl.constexpr, AT: tl.constexpr, block, group, inside):
    """The lower 4 bits of sixteen scales in 8 bytes, the upper 2 in 4 bytes, and one factor."""
    factor = _halves(base, AT, block, inside)
    number = (2 * group)[None, :]
    low = 12 * block + number % 8
    high = 12 * block + 8 + number % 4
    shift, bits = 4 * (number // 8), 2 * (number // 4)
    first = (_bytes(base, BYTES, low, inside) >> shift) & 15
    second = (_bytes(base, BYTES, low + 1, inside) >> shift) & 15
    first |= ((_bytes(base, BYTES, high, inside) >> bits) & 3) << 4
    second |= ((_bytes(base, BYTES, high + 1, inside) >> bits) & 3) << 4
    first = (first - 32).to(tl.float32) * factor
    second = (second - 32).to(tl.float32) * factor
    return first, second, first, second


@triton.jit
def _six_bits(base, block, group, inside):
    """q4_k and q5_k: scales and minima of the groups, each a 6-bit integer times a factor."""
    factor = _halves(base, 0, 8 * block, inside)
    factor_of_minimum = _halves(base, 0, 8 * block + 1, inside)
    a, b = words(base, 4, 4 * block, inside), words(base, 8, 4 * block, inside)
    c = words(base, 12, 4 * block, inside)
    by = (8 * (group % 4))[None, :]
    late = (group >= 4)[None, :]
    scale = tl.where(late, ((c >> by) & 15) | (((a >> by) >> 2) & 48), (a >> by) & 63)
    minimum = tl.where(late, (((c >> by) >> 4) & 15) | (((b >> by) >> 2) & 48), (b >> by) & 63)
    scale = scale.to(tl.float32) * factor
    return scale, scale, minimum.to(tl.float32) * factor_of_minimum, scale


@triton.jit
def _q6_k(base, BYTES: tl.constexpr, AT: tl.constexpr, block, group, inside):
    """A signed byte for each half of a group, and one factor."""
    factor = _halves(base, AT, block, inside)
    pointers = (base + BYTES).to(tl.pointer_type(tl.int8)) + block * 16 + (2 * group)[None, :]
    first = tl.load(pointers, mask=inside, other=0).to(tl.float32) * factor
    second = tl.load(pointers + 1, mask=inside, other=0).to(tl.float32) * factor
    return first, second, first, second
