"""Chunks of 256 weights: their integers, and their part of a row's product.

A weight is `scale * integer + offset * offset_factor`. Tensors are [rows, 8 groups, 4 words] (int32
words of four bytes) and [rows, 8 groups]; the layouts are those of `gpu_backend.formats`. Groups
that do not count (see facts.first_group) read as zeros.
"""

from __future__ import annotations

import triton
import triton.language as tl

from gpu_backend.kernels.exact import dot_bytes, fma
from gpu_backend.kernels.factors import factors, words
from gpu_backend.kernels.facts import (
    fact,
    first_group,
    has_offsets,
    has_table,
    mask_of,
    plane_at,
)
from gpu_backend.kernels.tables import look_up


@triton.jit
def _word_index(first, step, group):
    """first [rows] + step * group [8] + 0..3: int64 [rows, 8, 4]."""
    word = tl.arange(0, 4)
    return first[:, None, None] + (step * group)[None, :, None] + word[None, None, :]


@triton.jit
def integers(
    base, row, chunk, N: tl.constexpr, K: tl.constexpr, FORMAT: tl.constexpr, ROWS: tl.constexpr,
    EMULATE: tl.constexpr,
):  # fmt: skip
    """Both halves of each group, 16 weights each: two int32 [rows, 8, 4]."""
    group = tl.arange(0, 8)
    G: tl.constexpr = K // 32
    LOW: tl.constexpr = fact(FORMAT, "low_bits")  # also words of a group
    HIGH: tl.constexpr = fact(FORMAT, "high_bits")
    MASK: tl.constexpr = mask_of(LOW)
    begin = first_group(chunk, K)
    inside = tl.broadcast_to(
        (row < N)[:, None, None] & ((begin + group) >= chunk * 8)[None, :, None], (ROWS, 8, 4)
    )
    row = row.to(tl.int64)
    start = row * (G * LOW) + begin * LOW
    if fact(FORMAT, "is_split"):
        w = words(base, 0, _word_index(start, 4, group), inside)
        if has_table(FORMAT):
            first, second = look_up(w, FORMAT, EMULATE)
        else:
            first, second = w & MASK, (w >> 4) & MASK
    else:
        SHARING: tl.constexpr = fact(FORMAT, "sharing")
        RUNS: tl.constexpr = fact(FORMAT, "runs")
        index = _word_index(start, 8, RUNS * (group // SHARING) + group % RUNS)
        first, second = words(base, 0, index, inside), words(base, 0, index + 4, inside)
        if LOW < 8:
            shift = (LOW * ((group % SHARING) // RUNS))[None, :, None]
            first, second = (first >> shift) & MASK, (second >> shift) & MASK
    if HIGH > 0:
        AT: tl.constexpr = plane_at(FORMAT, 1, N, K)
        if fact(FORMAT, "single_bits"):
            index = _word_index(row * G + begin, 1, group) - tl.arange(0, 4)[None, None, :]
            bits = words(base, AT, index, inside) >> (4 * tl.arange(0, 4))[None, None, :]
            first |= _one_each(bits & 15) << LOW
            second |= _one_each((bits >> 16) & 15) << LOW
        else:
            PER: tl.constexpr = 8 // HIGH  # groups in the same bytes
            HIGH_MASK: tl.constexpr = mask_of(HIGH)
            start = row * (G * HIGH) + begin * HIGH
            index = _word_index(start, 8, group // PER)
            shift = (HIGH * (group % PER))[None, :, None]
            first |= ((words(base, AT, index, inside) >> shift) & HIGH_MASK) << LOW
            second |= ((words(base, AT, index + 4, inside) >> shift) & HIGH_MASK) << LOW
    return first, second


@triton.jit
def _one_each(bits):
    """Bits 0 to 3, each to the lowest place of a byte."""
    return (bits * 0x00204081) & 0x01010101


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
    SIGNED: tl.constexpr = fact(FORMAT, "signed")
    begin = first_group(chunk, K)
    known = (begin + group) >= chunk * 8
    first, second = integers(base, row, chunk, N, K, FORMAT, ROWS, EMULATE)
    scale, scale_2, offset, offset_2 = factors(base, row, chunk, group, N, K, FORMAT)
    word = (8 * (begin + group))[:, None] + tl.arange(0, 4)[None, :]
    x_first = tl.load(x + word, mask=known[:, None], other=0)
    x_second = tl.load(x + word + 4, mask=known[:, None], other=0)
    x_first = tl.broadcast_to(x_first[None, :, :], (ROWS, 8, 4))
    x_second = tl.broadcast_to(x_second[None, :, :], (ROWS, 8, 4))
    at = x_factors + begin + group
    x_scale = tl.broadcast_to(tl.load(at, mask=known, other=0.0)[None, :], (ROWS, 8))
    zero = tl.zeros((ROWS, 8, 4), tl.int32)
    dots = dot_bytes(first, x_first, zero, SIGNED, EMULATE)
    if fact(FORMAT, "num_scales") == 2:
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
        if has_offsets(FORMAT):
            x_sum = tl.broadcast_to(tl.load(at + plane, mask=known, other=0.0)[None, :], (ROWS, 8))
            offsets = fma(offset, x_sum, offsets, EMULATE)
    products = fma(tl.sum(dots, axis=2).to(tl.float32), scale * x_scale, products, EMULATE)
    return products, offsets


@triton.jit
def with_offsets(products, offsets, FORMAT: tl.constexpr, EMULATE: tl.constexpr):
    """What has been added up by `add_chunk`, as one."""
    if has_offsets(FORMAT):
        FACTOR: tl.constexpr = fact(FORMAT, "offset_factor")
        factor = tl.full(offsets.shape, FACTOR, tl.float32)
        products = fma(offsets, factor, products, EMULATE)
    return products
