"""Kernels for processors that this one is not, run here with plain code for their instructions: all
but the instructions themselves is tested by it, which test_other_processors.py looks for."""

import numpy as np
import pytest
from naive_formats import random_matrix
from plain_instructions import plain_instructions
from test_linear import assert_close, run_product

from cpu_kernels.activations import IN_BLOCKS
from cpu_kernels.amx_floats import make_amx_floats
from cpu_kernels.amx_gemm import make_amx_gemm
from cpu_kernels.compiler import callback
from cpu_kernels.formats import FORMATS
from cpu_kernels.isa import ISAS, available
from cpu_kernels.linear import FEW, FEW_ROWS, MANY, Matrix
from cpu_kernels.memory import NUM_KERNEL_ARGUMENTS
from cpu_kernels.panels import make_gemm
from cpu_kernels.products import make_gemv
from cpu_kernels.team import Team

# One scale for a group, and two; the others have tables, signs and single bits.
QUICK, OTHERS = ("q4_0", "q6_k"), ("q8_0", "iq4_xs", "q5_0", "q2_k")
formats = pytest.mark.parametrize(
    "format", [*QUICK, *[pytest.param(format, marks=pytest.mark.slow) for format in OTHERS]]
)
# Panels that are not full, a chunk that is not whole, and more chunks than are packed at once.
SHAPES = (75, 256), (43, 2304)
SHORT_SHAPES = (33, 96), (43, 2336)


def shapes_of(format):
    return SHORT_SHAPES if FORMATS[format].block_size == 32 else SHAPES


def compiled(make, isa, format):
    with plain_instructions():
        return callback(make(isa, format), NUM_KERNEL_ARGUMENTS, cache=False)


def random_product(rng, format, shape, n):
    data = random_matrix(rng, format, shape)
    bias = rng.standard_normal(shape[0]).astype(np.float32)
    matrix = Matrix(data.reshape(-1), format, shape, ISAS[available()[0]], bias)
    return matrix, (data, format, shape, rng.standard_normal((n, shape[1])).astype(np.float32))


@formats
def test_many_rows(format):
    rng = np.random.default_rng(1)
    kernel = compiled(make_gemm, "avx512_vnni", format)
    with Team(2) as team:
        for shape in shapes_of(format):
            matrix, problem = random_product(rng, format, shape, 37)
            matrix.record[MANY] = kernel.address
            got = run_product(team, matrix, problem[-1])
            assert_close(got, *problem, matrix.bias, isa="avx512_vnni")


@formats
def test_many_rows_with_tiles(format):
    """Where there are tiles, they give the same bits."""
    rng = np.random.default_rng(4)
    kernel = compiled(make_amx_gemm, "amx_bf16", format)
    with Team(2) as team:
        for shape in shapes_of(format):
            for n in (17, 70):
                matrix, problem = random_product(rng, format, shape, n)
                real = run_product(team, matrix, problem[-1])
                matrix.record[MANY] = kernel.address
                plain = run_product(team, matrix, problem[-1], rounds=IN_BLOCKS)
                assert_close(plain, *problem, matrix.bias, "amx_bf16")
                if "amx_bf16" in available():
                    np.testing.assert_array_equal(real, plain)


def test_bfloat16_weights_with_tiles():
    """The same of weights that are tiles as they are: any number of rows gives the same bits."""
    rng = np.random.default_rng(5)
    kernel = compiled(make_amx_floats, "amx_bf16", "bf16")
    with Team(2) as team:
        for shape in ((75, 256), (16, 32), (131, 96)):
            matrix, problem = random_product(rng, "bf16", shape, 70)
            x = problem[-1]
            real = run_product(team, matrix, x)
            matrix.record[[FEW, MANY]] = kernel.address
            plain = run_product(team, matrix, x)
            assert_close(plain, *problem, matrix.bias, "amx_bf16")
            for n in (1, 2, 17):
                np.testing.assert_array_equal(run_product(team, matrix, x[:n]), plain[:n])
            if "amx_bf16" in available():
                np.testing.assert_array_equal(real, plain)


@formats
@pytest.mark.parametrize("isa", ["avx512_vnni", "avx_vnni"])
def test_few_rows(format, isa):
    rng = np.random.default_rng(2)
    kernel = compiled(make_gemv, isa, format)
    with Team(2) as team:
        for shape in shapes_of(format):
            matrix, problem = random_product(rng, format, shape, FEW_ROWS)
            matrix.record[FEW] = kernel.address
            x = problem[-1]
            single = [run_product(team, matrix, x[i : i + 1]) for i in range(FEW_ROWS)]
            assert_close(np.concatenate(single), *problem, matrix.bias, isa=isa)
            for n in (8, FEW_ROWS):
                got = run_product(team, matrix, x[:n])
                np.testing.assert_array_equal(got, np.concatenate(single[:n]))


@formats
def test_many_rows_with_short_registers(format):
    rng = np.random.default_rng(3)
    kernel = compiled(make_gemm, "avx_vnni", format)
    with Team(2) as team:
        for shape in shapes_of(format):
            matrix, problem = random_product(rng, format, shape, 37)
            matrix.record[MANY] = kernel.address
            got = run_product(team, matrix, problem[-1])
            assert_close(got, *problem, matrix.bias, isa="avx_vnni")
