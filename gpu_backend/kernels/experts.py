"""The experts of a decode step: one launch over all (token, expert) pairs, wherever they lie.

`starts` says where a pair's expert begins in the slab, in bytes; below 0: it is not on this GPU,
and the pair is left alone. `owners` says which of the layer's experts it is: with `BIASED`, row
`owner` of `biases` has what its gate, up and down add, one after the other.
"""

from __future__ import annotations

import triton
import triton.language as tl

from gpu_backend.kernels.chunks import add_chunk, with_offsets
from gpu_backend.kernels.exact import total_of_groups
from gpu_backend.kernels.gating import activate
from gpu_backend.kernels.linear import row_dots


@triton.jit
def gate_up_kernel(
    slab, starts, owners, tokens, x, x_factors, plane, biases, out, GATE_AT, UP_AT,
    N: tl.constexpr, K: tl.constexpr, GATE: tl.constexpr, UP: tl.constexpr,
    ACTIVATION: tl.constexpr, LIMIT: tl.constexpr, BIASED: tl.constexpr,
    ROWS: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """out[pair] = activation(gate x, up x): float32 [num_pairs, N]. Grid: (N / ROWS, num_pairs).

    Both matrices advance together, so that twice the bytes are under way.
    """
    pair = tl.program_id(1)
    start = tl.load(starts + pair)
    if start >= 0:
        token = tl.load(tokens + pair)
        row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        base = tl.multiple_of(slab + start, 16)
        gate, up = base + GATE_AT, base + UP_AT
        x += token * (K // 4)
        x_factors += token * (K // 32)
        g = tl.zeros((ROWS, 8), tl.float32)
        g_offsets = tl.zeros((ROWS, 8), tl.float32)
        u = tl.zeros((ROWS, 8), tl.float32)
        u_offsets = tl.zeros((ROWS, 8), tl.float32)
        for chunk in tl.range((K + 255) // 256, loop_unroll_factor=2):
            g, g_offsets = add_chunk(
                g, g_offsets, gate, row, chunk, x, x_factors, plane, N, K, GATE, ROWS, EMULATE
            )
            u, u_offsets = add_chunk(
                u, u_offsets, up, row, chunk, x, x_factors, plane, N, K, UP, ROWS, EMULATE
            )
        g = total_of_groups(with_offsets(g, g_offsets, GATE, EMULATE), ROWS)
        u = total_of_groups(with_offsets(u, u_offsets, UP, EMULATE), ROWS)
        if BIASED:
            at = biases + tl.load(owners + pair).to(tl.int64) * (2 * N + K) + row
            g += tl.load(at, mask=row < N, other=0.0)
            u += tl.load(at + N, mask=row < N, other=0.0)
        inner = activate(g, u, ACTIVATION, LIMIT, EMULATE)
        tl.store(out + pair.to(tl.int64) * N + row, inner, mask=row < N)


@triton.jit
def down_kernel(
    slab, starts, owners, targets, x, x_factors, plane, biases, out, DOWN_AT,
    N: tl.constexpr, K: tl.constexpr, FORMAT: tl.constexpr, BIASED: tl.constexpr,
    ROWS: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """out[targets[pair]] = down x[pair]: rows of float32 [., N]. Grid: (num_pairs, N / ROWS)."""
    pair = tl.program_id(0)
    start = tl.load(starts + pair)
    if start >= 0:
        row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
        base = tl.multiple_of(slab + start, 16) + DOWN_AT
        total = row_dots(
            base, row, x + pair.to(tl.int64) * (K // 4), x_factors + pair.to(tl.int64) * (K // 32),
            plane,
            N, K, FORMAT, ROWS, EMULATE,
        )  # fmt: skip
        if BIASED:
            at = biases + tl.load(owners + pair).to(tl.int64) * (2 * K + N) + 2 * K + row
            total += tl.load(at, mask=row < N, other=0.0)
        target = tl.load(targets + pair).to(tl.int64)
        tl.store(out + target * N + row, total, mask=row < N)


@triton.jit
def combine_kernel(
    x, out, weights, H, TOP_K: tl.constexpr, WIDTH: tl.constexpr, EMULATE: tl.constexpr
):
    """x[t] += sum over ranks, in order, of weights[t, rank] * out[t * TOP_K + rank].

    x: float32 [num_tokens, H]. Grid: (num_tokens, H / WIDTH).
    """
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    inside = column < H
    total = tl.zeros((WIDTH,), tl.float32)
    for rank in tl.static_range(TOP_K):
        pair = token * TOP_K + rank
        # Rounded twice on purpose: what came from the CPU is added like what came from here.
        total += tl.load(weights + pair) * tl.load(out + pair * H + column, mask=inside, other=0.0)
    before = tl.load(x + token * H + column, mask=inside, other=0.0)
    tl.store(x + token * H + column, before + total, mask=inside)
