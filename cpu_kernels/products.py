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

import numpy as np

from cpu_kernels.activations import CHUNK, GROUP, HEADER_BYTES
from cpu_kernels.compiler import callback, inner
from cpu_kernels.dequantize import dequantize_floats, floats_to_float32
from cpu_kernels.few_floats import float_rows, multiply_few_floats
from cpu_kernels.few_rows import multiply_few
from cpu_kernels.formats import FORMATS
from cpu_kernels.gemv import (
    dot_few_floats,
    dot_few_quantized,
    dot_floats,
    dot_quantized,
    float_lanes,
)
from cpu_kernels.groups import GROUPS
from cpu_kernels.isa import ISAS
from cpu_kernels.memory import (
    NUM_KERNEL_ARGUMENTS,
    load_f32,
    load_i32,
    stack,
    store_f32,
    store_word,
    word,
)
from cpu_kernels.scales import block_of_a_group

FLOATS_BLOCK = 8  # rows of float weights that are multiplied with all activations, then the next


@inner
def source_row(x_rows, divisor, i):
    return load_i32(x_rows, i) // divisor if x_rows != 0 else i


@inner
def target_row(y, y_rows, ldy, i):
    row = load_i32(y_rows, i) if y_rows != 0 else i
    return y + 4 * row * ldy


@inner
def find_sources(sources, x, x_bytes, x_rows, divisor, first, count, n):
    """Addresses of `count` rows of activations at `x`, from row `first` of n on; the last one again
    after the end."""
    for i in range(count):
        row = source_row(x_rows, divisor, min(first + i, n - 1))
        store_word(sources, i, x + x_bytes * row)


@inner
def find_targets(targets, y, y_rows, ldy, first, count, n):
    """Where their results go, in the same way."""
    for i in range(count):
        store_word(targets, i, target_row(y, y_rows, ldy, min(first + i, n - 1)))


@inner
def _panels_from(num_groups, least_part, usually):
    """Rows of activations for which weights are worth being put into panels: two, if a whole last
    chunk, of which those need only the groups that are left, is a `least_part`-th of the work or
    more; else, as many as `usually`."""
    all_groups = (num_groups + GROUPS - 1) // GROUPS * GROUPS
    return 2 if least_part * (all_groups - num_groups) >= all_groups else usually


def make_gemv(isa: str, format: str) -> Callable:
    """Quantized weights and activations, few rows of activations."""
    block, block_bytes = FORMATS[format].block_size, FORMATS[format].block_bytes
    width, panels_from = ISAS[isa].panel_rows, ISAS[isa].panels_from
    # Scales that are the first of their group's bytes are quickly had, also by panels.
    least_part = 10 if block_of_a_group(format) else 5

    def gemv(weights, k, first, last, prepared, x_rows, divisor, n, y, y_rows, ldy, bias):
        row_bytes = k // block * block_bytes
        num_groups = k // GROUP
        x_bytes = word(prepared, 4)
        x = prepared + HEADER_BYTES
        in_panels = 0
        if num_groups >= GROUPS and n >= _panels_from(num_groups, least_part, panels_from):
            in_panels = (last - first) // width * width
        sources, targets, zeros = stack("128"), stack("128"), stack("64")
        find_sources(sources, x, x_bytes, x_rows, divisor, 0, n, n)
        find_targets(targets, y, y_rows, ldy, 0, n, n)
        for i in range(width):
            store_f32(zeros, i, 0.0)
        for row in range(first, first + in_panels, width):
            at = weights + row * row_bytes
            added = bias + 4 * row if bias != 0 else zeros
            multiply_few(
                isa, format, at, row_bytes, num_groups, sources, n, added, targets, 4 * row
            )
        for row in range(first + in_panels, last):
            at = weights + row * row_bytes
            added = load_f32(bias, row) if bias != 0 else np.float32(0.0)
            if n == 1:
                total = dot_quantized(isa, format, at, num_groups, word(sources, 0))
                store_f32(word(targets, 0), row, total + added)
            else:
                dot_few_quantized(isa, format, at, num_groups, sources, n, added, targets, 4 * row)

    return gemv


def make_float_gemv(isa: str, format: str) -> Callable:
    """Weights f32, f16 or bf16 with float32 activations."""
    size, at_once = FORMATS[format].block_bytes, float_rows(isa)
    # Conversions of their own cost time; where registers are short, tiles save less of it.
    worth_it_from = 4 if float_lanes(isa) == 16 else 8

    def float_gemv(weights, k, first, last, prepared, x_rows, divisor, n, y, y_rows, ldy, bias):
        row_bytes = k * size
        x = word(prepared, 0)
        x_bytes = word(prepared, 1)
        sources, targets, zeros = stack("128"), stack("128"), stack("64")
        even = n + n % 2  # a last one that is alone comes twice
        find_sources(sources, x, x_bytes, x_rows, divisor, 0, even, n)
        find_targets(targets, y, y_rows, ldy, 0, even, n)
        for i in range(at_once):
            store_f32(zeros, i, 0.0)
        if n >= worth_it_from and last - first >= at_once:
            for start in range(first, last, at_once):
                row = min(start, last - at_once)  # of less that is left, some come again
                at, added = weights + row * row_bytes, bias + 4 * row if bias != 0 else zeros
                ahead = min(at_once, last - row - at_once) * row_bytes
                multiply_few_floats(
                    isa, format, at, row_bytes, k, sources, even, added, targets, 4 * row, ahead
                )
            return
        for block in range(first, last, FLOATS_BLOCK):
            end = min(block + FLOATS_BLOCK, last)
            i = 0
            while i < n:
                left = n - i
                count = 3 if left == 3 or left > 4 else min(left, 2)
                # The last time that a block is used brings the next one.
                ahead = FLOATS_BLOCK * row_bytes if left == count else 0
                source, target = sources + 8 * i, targets + 8 * i
                for row in range(block, end):
                    at, offset = weights + row * row_bytes, 4 * row
                    added = load_f32(bias, row) if bias != 0 else np.float32(0.0)
                    if count == 3:
                        dot_few_floats(
                            isa, format, "3", at, k, ahead, source, added, target, offset
                        )
                    elif count == 2:
                        dot_few_floats(
                            isa, format, "2", at, k, ahead, source, added, target, offset
                        )
                    else:
                        total = dot_floats(isa, format, at, k, word(source, 0))
                        store_f32(word(target, 0), row, total + added)
                i += count

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


@cache
def kernel(make: Callable[[str, str], Callable], isa: str, format: str) -> tuple[int, object]:
    """Address of the machine code that `make` describes, and what keeps it alive."""
    code = callback(make(isa, format), NUM_KERNEL_ARGUMENTS)
    return code.address, code
