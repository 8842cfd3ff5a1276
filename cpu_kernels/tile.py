"""Small float32 matrix products C = A B (or C += A B), the arithmetic of attention.

Each element of C is one chain of multiply-adds in the order of the depth, whatever the shape of
the tile that computes it: the result does not depend on how rows and columns are cut.
"""

from __future__ import annotations

from collections.abc import Callable

from cpu_kernels.gemv import LINE
from cpu_kernels.isa import host_features
from cpu_kernels.lanes import ELEMENT_BYTES, LANES, load_lanes
from cpu_kernels.products import kernel
from cpu_kernels.simd import emitted, f32


@emitted("void", "i64 i64 i64 i64 i64 i64 i64 i64 i64 i64 i64")
def tile(k, shape, kind, a, a_row, b, b_step, b_vector, depth, c, c_row, fresh, next, pace):
    """`shape` is "rows x vectors"; all of C is kept in registers. See make_multiply. What lies at
    `next` is prefetched, `pace` bytes further at each step."""
    num_rows, num_vectors = (int(number) for number in shape.split("x"))
    cells = [(r, v) for r in range(num_rows) for v in range(num_vectors)]
    addresses = {(r, v): c + c_row * r + 4 * LANES * v for r, v in cells}
    zero, is_fresh = k.constant(f32(LANES), 0.0), fresh.compare("!=", 0)
    sums = {
        cell: k.variable(k.select(is_fresh, zero, k.load(address, f32(LANES), align=4)))
        for cell, address in addresses.items()
    }
    with k.loop(depth) as d:
        at = b + b_step * d
        values = [load_lanes(k, kind, at + b_vector * v) for v in range(num_vectors)]
        for line in range(0, ELEMENT_BYTES[kind] * LANES * num_vectors, LINE):
            k.prefetch(next + pace * d + line)
        for r in range(num_rows):
            factor = k.splat(k.load(a + a_row * r + d * 4, f32(1), align=4), LANES)
            for v in range(num_vectors):
                total = sums[r, v]
                total.set(k.multiply_add(factor, values[v], total.get()))
    for cell, address in addresses.items():
        k.store(address, sums[cell].get(), align=4)


def make_multiply(width: str, kind: str) -> Callable:
    """A kernel (see cpu_kernels.products) that multiplies float32 rows with a matrix whose elements
    are of `kind`, in registers that are "narrow" or "wide"."""
    # By rows of a tile; the 16 registers of AVX2 hold no 4 x 2.
    vectors_of_4 = 2 if width == "wide" else 1
    of_4 = f"4x{vectors_of_4}"

    def multiply(
        a, a_row, num_rows, b, b_step, b_vector, num_vectors, depth, c, c_row, fresh, ahead
    ):
        """C [num_rows, 16 * num_vectors] = A [num_rows, depth] B, or C += A B if not `fresh`.

        Rows of A and C are a_row and c_row bytes apart; the 16 columns of vector v at depth d of B
        are at b + d * b_step + v * b_vector. What lies `ahead` bytes after B, and is as large, is
        prefetched, each tile its share: misses of one tile's all at once would be too many.
        """
        num_tiles = num_rows // 4 * ((num_vectors + vectors_of_4 - 1) // vectors_of_4)
        num_tiles += num_rows // 2 % 2 * ((num_vectors + 1) // 2)
        num_tiles += num_rows % 2 * ((num_vectors + 3) // 4)
        pace = b_step // num_tiles
        next = b + ahead
        row = 0
        while row < num_rows:
            rows = 4 if num_rows - row >= 4 else 2 if num_rows - row >= 2 else 1
            most = vectors_of_4 if rows == 4 else 4 // rows
            ar, cr, v = a + row * a_row, c + row * c_row, 0
            while v < num_vectors:
                bv, cv = b + v * b_vector, cr + 4 * LANES * v
                vectors = most if v + most <= num_vectors else 1
                if rows == 4:
                    if vectors == vectors_of_4:
                        tile(
                            of_4, kind,
                            ar, a_row, bv, b_step, b_vector, depth, cv, c_row, fresh, next, pace,
                        )  # fmt: skip
                    else:
                        tile(
                            "4x1", kind,
                            ar, a_row, bv, b_step, b_vector, depth, cv, c_row, fresh, next, pace,
                        )  # fmt: skip
                elif rows == 2:
                    if vectors == 2:
                        tile(
                            "2x2", kind,
                            ar, a_row, bv, b_step, b_vector, depth, cv, c_row, fresh, next, pace,
                        )  # fmt: skip
                    else:
                        tile(
                            "2x1", kind,
                            ar, a_row, bv, b_step, b_vector, depth, cv, c_row, fresh, next, pace,
                        )  # fmt: skip
                elif vectors == 4:
                    tile(
                        "1x4", kind,
                        ar, a_row, bv, b_step, b_vector, depth, cv, c_row, fresh, next, pace,
                    )  # fmt: skip
                else:
                    tile(
                        "1x1", kind,
                        ar, a_row, bv, b_step, b_vector, depth, cv, c_row, fresh, next, pace,
                    )  # fmt: skip
                next += pace * depth
                v += vectors
            row += rows

    return multiply


def multiply_kernel(kind: str) -> int:
    """Address of the kernel for this processor, compiled if need be."""
    width = "wide" if host_features().get("avx512f", False) else "narrow"
    return kernel(make_multiply, width, kind)[0]
