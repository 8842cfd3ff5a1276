"""Chunks of 256 weights: what each number format's integers, scales and offsets are.

A weight is `scale * integer + offset`. Tensors are [rows, 8 groups, 4 words] (int32 words of four
bytes) and [rows, 8 groups]; the layouts are ggml's blocks (see cpu_kernels.groups) after
`gpu_backend.formats`. Groups past the end of a row read as zeros.
"""

from __future__ import annotations

import triton
import triton.language as tl

from gpu_backend.kernels.exact import dot_bytes, fma

NIBBLES = tl.constexpr(0x0F0F0F0F)


@triton.jit
def _words(base, offset, index, mask):
    """int32 number `index` (any shape) of the words `offset` bytes after `base`."""
    pointers = (base + offset).to(tl.pointer_type(tl.int32)) + index
    return tl.load(pointers, mask=mask, other=0, eviction_policy="evict_first")


@triton.jit
def _halves(base, offset, index, mask):
    """The float16 number `index` of those `offset` bytes after `base`, as float32."""
    pointers = (base + offset).to(tl.pointer_type(tl.float16)) + index
    return tl.load(pointers, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _word_index(first, step, group, ROWS: tl.constexpr):
    """first [rows] + step * group [8] + 0..3: int64 [rows, 8, 4]."""
    word = tl.arange(0, 4)
    return first[:, None, None] + (step * group)[None, :, None] + word[None, None, :]


@triton.jit
def integers(
    base, row, chunk, N: tl.constexpr, K: tl.constexpr, FORMAT: tl.constexpr, ROWS: tl.constexpr
):
    """Both halves of each group, 16 weights each: two int32 [rows, 8, 4]."""
    group = tl.arange(0, 8)
    G: tl.constexpr = K // 32
    inside = tl.broadcast_to(
        (row < N)[:, None, None] & (chunk * 8 + group < G)[None, :, None], (ROWS, 8, 4)
    )
    row = row.to(tl.int64)
    if FORMAT == "q4_0" or FORMAT == "q4_1":
        w = _words(base, 0, _word_index(row * (G * 4) + chunk * 32, 4, group, ROWS), inside)
        return w & NIBBLES, (w >> 4) & NIBBLES
    elif FORMAT == "q8_0":
        index = _word_index(row * (G * 8) + chunk * 64, 8, group, ROWS)
        return _words(base, 0, index, inside), _words(base, 0, index + 4, inside)
    elif FORMAT == "q4_k":
        index = _word_index((row * (K // 256) + chunk) * 36 + 4, 8, group // 2, ROWS)
        shift = (4 * (group % 2))[None, :, None]
        first, second = _words(base, 0, index, inside), _words(base, 0, index + 4, inside)
        return (first >> shift) & NIBBLES, (second >> shift) & NIBBLES
    elif FORMAT == "q5_k":
        block = (row * (K // 256) + chunk) * 44
        index = _word_index(block + 12, 8, group // 2, ROWS)
        high = _word_index(block + 4, 0, group, ROWS)
        shift = (4 * (group % 2))[None, :, None]
        bit = group[None, :, None]
        first = (_words(base, 0, index, inside) >> shift) & NIBBLES
        second = (_words(base, 0, index + 4, inside) >> shift) & NIBBLES
        first |= ((_words(base, 0, high, inside) >> bit) & 0x01010101) << 4
        second |= ((_words(base, 0, high + 4, inside) >> bit) & 0x01010101) << 4
        return first, second
    else:
        tl.static_assert(FORMAT == "q6_k")
        B: tl.constexpr = N * (K // 256)
        block = row * (K // 256) + chunk
        part, low = group // 4, group % 4
        index = _word_index(block * 32, 1, 16 * part + 8 * (low % 2), ROWS)
        high = _word_index(block * 16, 8, part, ROWS)
        shift = (4 * (low // 2))[None, :, None]
        bits = (2 * low)[None, :, None]
        first = (_words(base, 0, index, inside) >> shift) & NIBBLES
        second = (_words(base, 0, index + 4, inside) >> shift) & NIBBLES
        first |= ((_words(base, B * 128, high, inside) >> bits) & 0x03030303) << 4
        second |= ((_words(base, B * 128, high + 4, inside) >> bits) & 0x03030303) << 4
        return first, second


@triton.jit
def six_bit_factors(base, row, chunk, group, inside, K: tl.constexpr, BLOCK_WORDS: tl.constexpr):
    """q4_k and q5_k: scales and minima of the groups, each a 6-bit integer times a factor."""
    block = (row * (K // 256) + chunk) * BLOCK_WORDS
    first = block[:, None] + tl.zeros_like(group)[None, :]
    factor = _halves(base, 0, 2 * first, inside)
    factor_of_minimum = _halves(base, 0, 2 * first + 1, inside)
    a, b = _words(base, 4, first, inside), _words(base, 8, first, inside)
    c = _words(base, 12, first, inside)
    by = (8 * (group % 4))[None, :]
    late = (group >= 4)[None, :]
    scale = tl.where(late, ((c >> by) & 15) | (((a >> by) >> 2) & 48), (a >> by) & 63)
    minimum = tl.where(late, (((c >> by) >> 4) & 15) | (((b >> by) >> 2) & 48), (b >> by) & 63)
    return scale.to(tl.float32) * factor, minimum.to(tl.float32) * factor_of_minimum


@triton.jit
def factors(base, row, chunk, group, N: tl.constexpr, K: tl.constexpr, FORMAT: tl.constexpr):
    """float32 [rows, groups]: scales of first and second halves, and what their sums are
    multiplied with (q6_k), or of whole groups (all others; the second ones are the same)."""
    G: tl.constexpr = K // 32
    inside = (row < N)[:, None] & (chunk * 8 + group < G)[None, :]
    row = row.to(tl.int64)
    if FORMAT == "q4_0" or FORMAT == "q8_0":
        WIDTH: tl.constexpr = 16 if FORMAT == "q4_0" else 32
        index = (row * G + chunk * 8)[:, None] + group[None, :]
        scale = _halves(base, N * G * WIDTH, index, inside)
        return scale, scale, scale * -8.0, scale
    elif FORMAT == "q4_1":
        index = ((row * G + chunk * 8)[:, None] + group[None, :]) * 2
        scale = _halves(base, N * G * 16, index, inside)
        return scale, scale, _halves(base, N * G * 16, index + 1, inside), scale
    elif FORMAT == "q4_k":
        scale, minimum = six_bit_factors(base, row, chunk, group, inside, K, 36)
        return scale, scale, minimum * -1.0, scale
    elif FORMAT == "q5_k":
        scale, minimum = six_bit_factors(base, row, chunk, group, inside, K, 44)
        return scale, scale, minimum * -1.0, scale
    else:
        tl.static_assert(FORMAT == "q6_k")
        B: tl.constexpr = N * (K // 256)
        block = (row * (K // 256) + chunk)[:, None] + tl.zeros_like(group)[None, :]
        factor = _halves(base, B * 208, block, inside)
        pointers = (base + B * 192).to(tl.pointer_type(tl.int8)) + block * 16 + (2 * group)[None, :]
        first = tl.load(pointers, mask=inside, other=0).to(tl.float32) * factor
        second = tl.load(pointers + 1, mask=inside, other=0).to(tl.float32) * factor
        return first, second, first * -32.0, second * -32.0


@triton.jit
def add_chunk(
    products, offsets, base, row, chunk, x, x_factors, plane,
    N: tl.constexpr, K: tl.constexpr, FORMAT: tl.constexpr, ROWS: tl.constexpr,
    EMULATE: tl.constexpr,
):  # fmt: skip
    """Add a chunk's part of the rows times one row of activations to two float32 [rows, 8].

    `x` are its int8 values as words, `x_factors` the first of four planes of float32 (scales,
    sums, first sums, second sums), `plane` values apart.
    """
    group = tl.arange(0, 8)
    G: tl.constexpr = K // 32
    known = chunk * 8 + group < G
    first, second = integers(base, row, chunk, N, K, FORMAT, ROWS)
    scale, scale_2, offset, offset_2 = factors(base, row, chunk, group, N, K, FORMAT)
    word = (chunk * 64 + 8 * group)[:, None] + tl.arange(0, 4)[None, :]
    x_first = tl.load(x + word, mask=known[:, None], other=0)
    x_second = tl.load(x + word + 4, mask=known[:, None], other=0)
    x_first = tl.broadcast_to(x_first[None, :, :], (ROWS, 8, 4))
    x_second = tl.broadcast_to(x_second[None, :, :], (ROWS, 8, 4))
    at = x_factors + chunk * 8 + group
    x_scale = tl.broadcast_to(tl.load(at, mask=known, other=0.0)[None, :], (ROWS, 8))
    zero = tl.zeros((ROWS, 8, 4), tl.int32)
    SIGNED: tl.constexpr = FORMAT == "q8_0"
    dots = dot_bytes(first, x_first, zero, SIGNED, EMULATE)
    if FORMAT == "q6_k":
        sums = tl.sum(dots, axis=2).to(tl.float32)
        products = fma(sums, scale * x_scale, products, EMULATE)
        scale = scale_2
        dots = dot_bytes(second, x_second, zero, SIGNED, EMULATE)
        x_sum = tl.broadcast_to(tl.load(at + 2 * plane, mask=known, other=0.0)[None, :], (ROWS, 8))
        offsets = fma(offset, x_sum, offsets, EMULATE)
        x_sum = tl.broadcast_to(tl.load(at + 3 * plane, mask=known, other=0.0)[None, :], (ROWS, 8))
        offsets = fma(offset_2, x_sum, offsets, EMULATE)
    else:
        dots = dot_bytes(second, x_second, dots, SIGNED, EMULATE)
        if FORMAT != "q8_0":
            x_sum = tl.broadcast_to(tl.load(at + plane, mask=known, other=0.0)[None, :], (ROWS, 8))
            offsets = fma(offset, x_sum, offsets, EMULATE)
    products = fma(tl.sum(dots, axis=2).to(tl.float32), scale * x_scale, products, EMULATE)
    return products, offsets
