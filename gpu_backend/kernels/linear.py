"""y = W x for rows of activations, one program per row of activations and ROWS features."""

from __future__ import annotations

import triton
import triton.language as tl

from gpu_backend.kernels.chunks import add_chunk, with_offsets
from gpu_backend.kernels.exact import total_of_groups


@triton.jit
def row_dots(
    base, row, x, x_factors, plane,
    N: tl.constexpr, K: tl.constexpr, FORMAT: tl.constexpr, ROWS: tl.constexpr,
    EMULATE: tl.constexpr,
):  # fmt: skip
    """The rows `row` (int32 [ROWS]) of the matrix at `base` times one row of activations."""
    products = tl.zeros((ROWS, 8), tl.float32)
    offsets = tl.zeros((ROWS, 8), tl.float32)
    for chunk in tl.range((K + 255) // 256, loop_unroll_factor=4):
        products, offsets = add_chunk(
            products, offsets, base, row, chunk, x, x_factors, plane,
            N, K, FORMAT, ROWS, EMULATE,
        )  # fmt: skip
    return total_of_groups(with_offsets(products, offsets, FORMAT, EMULATE), ROWS)


@triton.jit
def linear_kernel(
    base, x, x_factors, plane, y,
    N: tl.constexpr, K: tl.constexpr, FORMAT: tl.constexpr, ROWS: tl.constexpr,
    EMULATE: tl.constexpr,
):  # fmt: skip
    """base: the matrix's bytes; x: int8 [M, K] as int32; y: float32 [M, N]. Grid: (N / ROWS, M)."""
    m = tl.program_id(1)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    total = row_dots(
        base, row, x + m * (K // 4), x_factors + m * (K // 32), plane, N, K, FORMAT, ROWS, EMULATE
    )
    tl.store(y + m.to(tl.int64) * N + row, total, mask=row < N)
