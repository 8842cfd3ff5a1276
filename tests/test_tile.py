import ctypes

import numpy as np
import pytest

from cpu_kernels.products import kernel
from cpu_kernels.tile import REGISTERS, make_multiply

DTYPES = {"f32": np.float32, "f16": np.float16, "int8": np.int8}


def multiply(registers, kind, *arguments):
    address = kernel(make_multiply, registers, kind)[0]
    ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * 12)(address)(*arguments)


@pytest.mark.parametrize("kind", DTYPES)
@pytest.mark.parametrize("registers", REGISTERS)
def test_products_of_all_shapes(registers, kind):
    random = np.random.default_rng(0)
    for num_rows in (1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 17):
        for num_panels in (1, 2, 3, 5, 8):
            depth, columns = 33, 16 * num_panels
            a = random.standard_normal((num_rows, depth)).astype(np.float32)
            b = (random.standard_normal((depth, columns)) * 20).astype(DTYPES[kind])
            panels = np.ascontiguousarray(b.reshape(depth, num_panels, 16).swapaxes(0, 1))
            c = np.ones((num_rows, columns), np.float32)
            exact = a.astype(np.float64) @ b.astype(np.float64)
            for fresh in (0, 1):
                multiply(
                    registers, kind, a.ctypes.data, a.strides[0], num_rows, panels.ctypes.data,
                    panels.strides[0], num_panels, depth, c.ctypes.data, c.strides[0], fresh,
                    panels.ctypes.data, 0,
                )  # fmt: skip
                # 33 products of size 20, each rounded to 24 bits.
                np.testing.assert_allclose(c, exact + (1 - fresh), rtol=1e-5, atol=2e-4)
            # The same bits for each row and each panel alone.
            alone = np.zeros_like(c)
            for row in range(num_rows):
                for panel in range(num_panels):
                    multiply(
                        registers, kind, a[row:].ctypes.data, a.strides[0], 1,
                        panels[panel].ctypes.data, panels.strides[0], 1, depth,
                        alone[row:, 16 * panel :].ctypes.data, c.strides[0], 1,
                        panels.ctypes.data, 0,
                    )  # fmt: skip
            assert (alone == c).all()
