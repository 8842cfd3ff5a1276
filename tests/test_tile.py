import ctypes

import numpy as np
import pytest

from cpu_kernels.products import kernel
from cpu_kernels.tile import make_multiply

DTYPES = {"f32": np.float32, "f16": np.float16, "int8": np.int8}


def multiply(width, kind, *arguments):
    address = kernel(make_multiply, width, kind)[0]
    ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * 12)(address)(*arguments)


@pytest.mark.parametrize("kind", DTYPES)
@pytest.mark.parametrize("width", ["narrow", "wide"])
def test_products_of_all_shapes(width, kind):
    random = np.random.default_rng(0)
    for num_rows in (1, 2, 3, 4, 5, 7, 8, 11):
        for num_vectors in (1, 2, 3, 5, 8):
            depth, columns = 33, 16 * num_vectors
            a = random.standard_normal((num_rows, depth)).astype(np.float32)
            b = (random.standard_normal((depth, columns)) * 20).astype(DTYPES[kind])
            c = np.ones((num_rows, columns), np.float32)
            exact = a.astype(np.float64) @ b.astype(np.float64)
            size = b.itemsize
            for fresh in (0, 1):
                multiply(
                    width, kind, a.ctypes.data, 4 * depth, num_rows, b.ctypes.data,
                    size * columns, 16 * size, num_vectors, depth, c.ctypes.data, 4 * columns,
                    fresh, 0,
                )  # fmt: skip
                # 33 products of size 20, each rounded to 24 bits.
                np.testing.assert_allclose(c, exact + (1 - fresh), rtol=1e-5, atol=2e-4)
            # The same bits for each row and each vector alone.
            alone = np.zeros_like(c)
            for row in range(num_rows):
                for v in range(num_vectors):
                    multiply(
                        width, kind, a[row:].ctypes.data, 4 * depth, 1,
                        b[:, 16 * v :].ctypes.data, size * columns, 16 * size, 1, depth,
                        alone[row:, 16 * v :].ctypes.data, 4 * columns, 1, 0,
                    )  # fmt: skip
            assert (alone == c).all()
