"""Kernels: machine code that multiplies rows of weights with rows of activations.

There is one for each number format and arithmetic, compiled only when a model needs it, and called
by address with twelve int64:

    weights     address of the first row of the matrix
    k           length of a row
    first, last the rows of weights to multiply
    prepared    activations, from cpu_kernels.activations
    x_rows      address of int32 [n], or 0: row i of the product is of prepared row
    divisor     x_rows[i] // divisor (or i)
    n           rows of activations
    y           address of float32; row i of the product goes
    y_rows      to row y_rows[i] (address of int32 [n], or 0: i),
    ldy         which are ldy values apart
    bias        address of float32 [rows], or 0
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

from numba import cfunc, njit, types

from cpu_kernels.activations import CHUNK, HEADER_BYTES
from cpu_kernels.cache import compiling
from cpu_kernels.dequantize import dequantize_floats, floats_to_float32
from cpu_kernels.formats import FORMATS
from cpu_kernels.gemv import dot_1, dot_2, dot_4, dot_floats
from cpu_kernels.memory import (
    NUM_KERNEL_ARGUMENTS,
    load_f32,
    load_i32,
    stack,
    store_f32,
    word,
)


@njit(inline="always")
def source_row(x_rows, divisor, i):
    return load_i32(x_rows, i) // divisor if x_rows != 0 else i


@njit(inline="always")
def target_row(y, y_rows, ldy, i):
    row = load_i32(y_rows, i) if y_rows != 0 else i
    return y + 4 * row * ldy


def make_gemv(isa: str, format: str) -> Callable:
    """Quantized weights and activations, few rows of activations."""
    block, block_bytes = FORMATS[format].block_size, FORMATS[format].block_bytes

    def gemv(weights, k, first, last, prepared, x_rows, divisor, n, y, y_rows, ldy, bias):
        row_bytes = k // block * block_bytes
        num_groups = k // 32
        x_bytes = word(prepared, 4)
        x = prepared + HEADER_BYTES
        results = stack("16")
        for row in range(first, last):
            at = weights + row * row_bytes
            added = load_f32(bias, row) if bias != 0 else 0.0
            i = 0
            while i < n:
                x0 = x + x_bytes * source_row(x_rows, divisor, i)
                if n - i == 1:
                    store_f32(results, 0, dot_1(isa, format, at, num_groups, x0))
                else:
                    x1 = x + x_bytes * source_row(x_rows, divisor, i + 1)
                    if n - i == 2:
                        dot_2(isa, format, at, num_groups, x0, x1, results)
                    else:  # three rows are computed as four, one of them twice
                        x2 = x + x_bytes * source_row(x_rows, divisor, i + 2)
                        x3 = x + x_bytes * source_row(x_rows, divisor, min(i + 3, n - 1))
                        dot_4(isa, format, at, num_groups, x0, x1, x2, x3, results)
                for j in range(min(4, n - i)):
                    total = load_f32(results, j) + added
                    store_f32(target_row(y, y_rows, ldy, i + j), row, total)
                i += 4

    return gemv


def make_float_gemv(isa: str, format: str) -> Callable:
    """Weights f32, f16 or bf16 with float32 activations."""
    size = FORMATS[format].block_bytes

    def float_gemv(weights, k, first, last, prepared, x_rows, divisor, n, y, y_rows, ldy, bias):
        x = word(prepared, 0)
        x_bytes = word(prepared, 1)
        for row in range(first, last):
            added = load_f32(bias, row) if bias != 0 else 0.0
            for i in range(n):
                source = x + x_bytes * source_row(x_rows, divisor, i)
                total = dot_floats(isa, format, weights + row * k * size, k, source)
                store_f32(target_row(y, y_rows, ldy, i), row, total + added)

    return float_gemv


def make_exact_gemv(isa: str, format: str) -> Callable:
    """Quantized weights with float32 activations: a row is dequantized, then multiplied."""
    block, block_bytes = FORMATS[format].block_size, FORMATS[format].block_bytes

    def exact_gemv(weights, k, first, last, prepared, x_rows, divisor, n, y, y_rows, ldy, bias):
        x = word(prepared, 0)
        x_bytes = word(prepared, 1)
        row_bytes = k // block * block_bytes
        values = stack("1024")
        for row in range(first, last):
            at = weights + row * row_bytes
            for i in range(n):
                target = target_row(y, y_rows, ldy, i)
                store_f32(target, row, load_f32(bias, row) if bias != 0 else 0.0)
            for start in range(0, k, CHUNK):
                count = min(CHUNK, k - start)
                dequantize_floats(format, at, k, start, count, values)
                for i in range(n):
                    source = x + x_bytes * source_row(x_rows, divisor, i) + 4 * start
                    target = target_row(y, y_rows, ldy, i)
                    total = dot_floats(isa, "f32", values, count, source)
                    store_f32(target, row, load_f32(target, row) + total)

    return exact_gemv


def make_dequantize(isa: str, format: str) -> Callable:
    """One row (`first`) of any format, as float32 at `y`; the other arguments do not matter."""
    block, block_bytes = FORMATS[format].block_size, FORMATS[format].block_bytes
    is_float = FORMATS[format].is_float

    def dequantize(weights, k, first, last, prepared, x_rows, divisor, n, y, y_rows, ldy, bias):
        at = weights + first * (k // block * block_bytes)
        if is_float:
            floats_to_float32(format, at, k, y)
        else:
            dequantize_floats(format, at, k, 0, k, y)

    return dequantize


_SIGNATURE = types.void(*[types.int64] * NUM_KERNEL_ARGUMENTS)


@cache
def kernel(make: Callable[[str, str], Callable], isa: str, format: str) -> tuple[int, object]:
    """Address of the machine code that `make` describes, and what keeps it alive."""
    with compiling():
        code = cfunc(_SIGNATURE, cache=True, error_model="numpy")(make(isa, format))
    return code.address, code
