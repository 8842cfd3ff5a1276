"""Many rows of activations at once: integer matrix products, one group of 32 at a time.

A group's product is one `tl.dot` of int8, which is exact; the sums are scaled and added to the
accumulator of the group's place in its chunk, so every result is bit by bit the decode kernels'.
Eight accumulators are the price of that.
"""

from __future__ import annotations

import triton
import triton.language as tl

from gpu_backend.kernels.chunks import with_offsets
from gpu_backend.kernels.exact import fma
from gpu_backend.kernels.factors import factors
from gpu_backend.kernels.facts import fact, first_group, has_offsets, has_table, plane_at
from gpu_backend.kernels.gating import activate
from gpu_backend.kernels.tables import look_up_one


@triton.jit
def group_bytes(
    base, row, chunk, place, N: tl.constexpr, K: tl.constexpr, FORMAT: tl.constexpr,
    EMULATE: tl.constexpr,
):  # fmt: skip
    """The integers of group `place` (0 to 7) of a chunk: int8 [rows, 32]. See chunks.integers."""
    k = tl.arange(0, 32)[None, :]
    G: tl.constexpr = K // 32
    LOW: tl.constexpr = fact(FORMAT, "low_bits")
    HIGH: tl.constexpr = fact(FORMAT, "high_bits")
    begin = first_group(chunk, K)
    group = begin + place + tl.zeros_like(k)  # [1, 32]
    inside = (row < N)[:, None] & (group >= chunk * 8)
    row = row.to(tl.int64)[:, None]
    start = base + row * (G * LOW * 4) + begin * (LOW * 4)
    if fact(FORMAT, "is_split"):
        w = tl.load(start + place * 16 + k % 16, mask=inside, other=0).to(tl.int32)
        w = (w >> (4 * (k // 16))) & 15
    else:
        SHARING: tl.constexpr = fact(FORMAT, "sharing")
        RUNS: tl.constexpr = fact(FORMAT, "runs")
        run = RUNS * (place // SHARING) + place % RUNS
        w = tl.load(start + run * 32 + k, mask=inside, other=0).to(tl.int32)
        if LOW < 8:
            w = (w >> (LOW * ((place % SHARING) // RUNS))) & ((1 << LOW) - 1)
    if has_table(FORMAT):
        w = look_up_one(w, FORMAT, EMULATE)
    if HIGH > 0:
        high = base + plane_at(FORMAT, 1, N, K)
        if fact(FORMAT, "single_bits"):
            high += row * (G * 4) + (begin + place) * 4 + k // 8
            bits = tl.load(high, mask=inside, other=0).to(tl.int32) >> (k % 8)
        else:
            PER: tl.constexpr = 8 // HIGH
            high += row * (G * HIGH * 4) + begin * (HIGH * 4) + place // PER * 32 + k
            bits = tl.load(high, mask=inside, other=0).to(tl.int32) >> (HIGH * (place % PER))
        w |= (bits & ((1 << HIGH) - 1)) << LOW
    return w.to(tl.int8)


@triton.jit
def dot(x, weights, FLOAT_DOT: tl.constexpr):
    """Exact sums of products, as float32. `FLOAT_DOT`: for cards whose matrix units Triton drives
    with float16 only (sm_75); products and sums are whole numbers below 2**20, so still exact."""
    if FLOAT_DOT:
        return tl.dot(x.to(tl.float16), weights.to(tl.float16), out_dtype=tl.float32)
    else:
        return tl.dot(x, weights, out_dtype=tl.int32).to(tl.float32)


@triton.jit
def add_group(
    products, offsets, base, row, chunk, place, x, x_factors, plane, token, known,
    N: tl.constexpr, K: tl.constexpr, FORMAT: tl.constexpr,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, FLOAT_DOT: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """Group `place` of a chunk: add to two float32 [tokens, rows]."""
    G: tl.constexpr = K // 32
    group = first_group(chunk, K) + place
    k = tl.arange(0, 32)
    inside = known & ((group + tl.zeros_like(token)) >= chunk * 8)
    token = token.to(tl.int64)
    at = token[:, None] * K + group * 32 + k[None, :]
    values = tl.load(x + at, mask=inside[:, None], other=0)  # int8 [tokens, 32]
    weights = group_bytes(base, row, chunk, place, N, K, FORMAT, EMULATE)
    weights = tl.trans(weights)  # [32, rows]
    one = tl.arange(0, 1) + place
    scale, scale_2, offset, offset_2 = factors(base, row, chunk, one, N, K, FORMAT)  # [rows, 1]
    scale = tl.trans(scale)
    at_factor = x_factors + token * G + group
    x_scale = tl.load(at_factor, mask=inside, other=0.0)[:, None]
    zero = tl.zeros((TOKENS, ROWS), tl.float32)
    if fact(FORMAT, "num_scales") == 2:
        first = tl.where((k < 16)[None, :], values, 0).to(tl.int8)
        dots = dot(first, weights, FLOAT_DOT)
        products = fma(dots, scale * x_scale, products, EMULATE)
        scale = tl.trans(scale_2)
        dots = dot((values - first).to(tl.int8), weights, FLOAT_DOT)
        x_sum = tl.load(at_factor + 2 * plane, mask=inside, other=0.0)[:, None]
        offsets = fma(tl.trans(offset) + zero, x_sum + zero, offsets, EMULATE)
        x_sum = tl.load(at_factor + 3 * plane, mask=inside, other=0.0)[:, None]
        offsets = fma(tl.trans(offset_2) + zero, x_sum + zero, offsets, EMULATE)
    else:
        dots = dot(values, weights, FLOAT_DOT)
        if has_offsets(FORMAT):
            x_sum = tl.load(at_factor + plane, mask=inside, other=0.0)[:, None]
            offsets = fma(tl.trans(offset) + zero, x_sum + zero, offsets, EMULATE)
    products = fma(dots, scale * x_scale, products, EMULATE)
    return products, offsets


@triton.jit
def tile(
    base, row, x, x_factors, plane, token, known,
    N: tl.constexpr, K: tl.constexpr, FORMAT: tl.constexpr,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, FLOAT_DOT: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """Rows `row` of a matrix times rows `token` of the activations: float32 [tokens, rows].

    The groups' places are computed one after the other, each over the whole row, instead of
    side by side: two accumulators instead of 16, and short reads whose cache lines the next
    places find in the cache. They are added in the order of the contract:
    ((0 + 1) + (4 + 5)) + ((2 + 3) + (6 + 7)).
    """
    zero = tl.zeros((TOKENS, ROWS), tl.float32)
    result = zero
    for half in range(2):
        part = zero
        for late in range(2):
            total = zero
            for odd in range(2):
                products, offsets = zero, zero
                for chunk in range((K + 255) // 256):
                    products, offsets = add_group(
                        products, offsets, base, row, chunk, 2 * half + 4 * late + odd,
                        x, x_factors, plane, token, known,
                        N, K, FORMAT, TOKENS, ROWS, FLOAT_DOT, EMULATE,
                    )  # fmt: skip
                total += with_offsets(products, offsets, FORMAT, EMULATE)
            part += total
        result += part
    return result


@triton.jit
def grouped_gate_up_kernel(
    slab, tile_starts, tile_owners, tile_first, tile_count, tokens, x, x_factors, plane, biases,
    out, GATE_AT, UP_AT,
    N: tl.constexpr, K: tl.constexpr, GATE: tl.constexpr, UP: tl.constexpr,
    ACTIVATION: tl.constexpr, LIMIT: tl.constexpr, BIASED: tl.constexpr,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, FLOAT_DOT: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """out[p] = activation(gate x[tokens[p]], up x[tokens[p]]). Grid: (N / ROWS, num_tiles).

    Tile t has pairs tile_first[t] and on, tile_count[t] <= TOKENS of them, of the expert at
    tile_starts[t] in the slab; tile_owners and biases are as in decode (kernels.experts).
    """
    t = tl.program_id(1)
    pair = tl.load(tile_first + t) + tl.arange(0, TOKENS)
    known = tl.arange(0, TOKENS) < tl.load(tile_count + t)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    base = tl.multiple_of(slab + tl.load(tile_starts + t), 16)
    token = tl.load(tokens + pair, mask=known, other=0)
    g = tile(
        base + GATE_AT, row, x, x_factors, plane, token, known,
        N, K, GATE, TOKENS, ROWS, FLOAT_DOT, EMULATE,
    )  # fmt: skip
    u = tile(
        base + UP_AT, row, x, x_factors, plane, token, known,
        N, K, UP, TOKENS, ROWS, FLOAT_DOT, EMULATE,
    )  # fmt: skip
    if BIASED:
        at = biases + tl.load(tile_owners + t).to(tl.int64) * (2 * N + K) + row
        g += tl.load(at, mask=row < N, other=0.0)[None, :]
        u += tl.load(at + N, mask=row < N, other=0.0)[None, :]
    at = pair.to(tl.int64)[:, None] * N + row[None, :]
    inner = activate(g, u, ACTIVATION, LIMIT, EMULATE)
    tl.store(out + at, inner, mask=known[:, None] & (row < N)[None, :])


@triton.jit
def grouped_linear_kernel(
    slab, tile_starts, tile_owners, tile_first, tile_count, targets, x, x_factors, plane, biases,
    out, AT,
    N: tl.constexpr, K: tl.constexpr, FORMAT: tl.constexpr, BIASED: tl.constexpr,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, FLOAT_DOT: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """out[targets[p]] = W x[p], tiles as above: the experts' down, and dense matrices."""
    t = tl.program_id(1)
    pair = tl.load(tile_first + t) + tl.arange(0, TOKENS)
    known = tl.arange(0, TOKENS) < tl.load(tile_count + t)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    base = tl.multiple_of(slab + tl.load(tile_starts + t), 16) + AT
    y = tile(
        base, row, x, x_factors, plane, pair, known, N, K, FORMAT, TOKENS, ROWS, FLOAT_DOT, EMULATE
    )
    if BIASED:
        at = biases + tl.load(tile_owners + t).to(tl.int64) * (2 * K + N) + 2 * K + row
        y += tl.load(at, mask=row < N, other=0.0)[None, :]
    target = tl.load(targets + pair, mask=known, other=0).to(tl.int64)
    at = target[:, None] * N + row[None, :]
    tl.store(out + at, y, mask=known[:, None] & (row < N)[None, :])
