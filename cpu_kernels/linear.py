"""Matrices of weights in any number format, and y = W x for rows of activations.

    prepare_activations(x, ldx, n, k, prepared, thread, num_threads)
    barrier(team)
    multiply(matrix, prepared, n, y, ldy, team, counter)

inside an op; `matrix` is `Matrix.address`. A product with up to FEW_ROWS rows of activations gives
each row exactly what it would get alone.
"""

from __future__ import annotations

import numpy as np

from cpu_kernels.activations import FEW_ROWS, prepare_activations, prepared_bytes
from cpu_kernels.amx_floats import fits, make_amx_floats
from cpu_kernels.amx_gemm import make_amx_gemm
from cpu_kernels.compiler import inner
from cpu_kernels.formats import FORMATS
from cpu_kernels.isa import Isa
from cpu_kernels.memory import address_of, call_kernel, load_i32, word
from cpu_kernels.panels import make_float_gemm, make_gemm
from cpu_kernels.products import (
    kernel,
    make_dequantize,
    make_exact_gemv,
    make_float_gemv,
    make_gemv,
)
from cpu_kernels.team import next_task, part_of, parts_of, share

ROW_BLOCK = 16  # threads share the rows of a matrix in blocks of this many

# Words of a matrix's record.
DATA, ROWS, COLUMNS, ROW_BYTES, BIAS, FEW, MANY, DEQUANTIZE = range(8)


def products_of(
    isa: Isa, format: str, shape: tuple[int, int], exact: bool = False
) -> tuple[int, int]:
    """Addresses of the kernels of a format for few and for many rows of activations."""
    if format == "bf16" and isa.has_tiles and fits(shape) and not exact:
        few = many = make_amx_floats
    elif FORMATS[format].is_float:
        few, many = make_float_gemv, make_float_gemm
    elif exact:
        few, many = make_exact_gemv, make_float_gemm
    else:
        few, many = make_gemv, make_amx_gemm if isa.has_tiles else make_gemm
    return kernel(few, isa.name, format)[0], kernel(many, isa.name, format)[0]


class Matrix:
    """Weights [out_features, in_features] whose bytes are used where they are.

    `data`: uint8, rows of blocks of `format` one after the other, of any alignment; it is kept, not
    copied. `bias`: float32 [out_features]. `exact`: activations are float32, instead of
    int8 for quantized weights, or two bfloat16 for bfloat16 ones where there is AMX. Raises
    ValueError if the data is too short.
    """

    def __init__(
        self,
        data: np.ndarray,
        format: str,
        shape: tuple[int, int],
        isa: Isa,
        bias: np.ndarray | None = None,
        exact: bool = False,
    ) -> None:
        if format not in FORMATS:
            raise ValueError(f"unknown number format {format!r}: expected one of {list(FORMATS)}")
        if len(shape) != 2 or min(shape) < 1:
            raise ValueError(f"a matrix needs two dimensions of at least 1, not shape {shape}")
        row_bytes = FORMATS[format].row_bytes(shape[1])
        if data.dtype != np.uint8 or not data.flags.c_contiguous:
            raise ValueError(f"the data of a matrix must be contiguous uint8, not {data.dtype}")
        if data.size < shape[0] * row_bytes:
            raise ValueError(
                f"a {format} matrix of shape {shape} has {shape[0] * row_bytes} bytes, "
                f"but only {data.size} are there"
            )
        if bias is not None:
            bias = np.ascontiguousarray(bias, np.float32)
            if bias.shape != (shape[0],):
                raise ValueError(f"bias must have shape ({shape[0]},), not {bias.shape}")
        self.format, self.shape, self.data, self.bias = format, tuple(shape), data, bias
        few, many = products_of(isa, format, shape, exact)
        dequantize = kernel(make_dequantize, isa.name, format)[0]
        words = data.ctypes.data, *shape, row_bytes, address_of(bias), few, many, dequantize
        self.record = np.array(words, np.int64)
        self.address = address_of(self.record)


@inner
def multiply(matrix, prepared, n, y, ldy, team, counter):
    """Output features, for n rows: float32 y[i * ldy + feature]. Threads take parts of them by a
    counter of the op (see team.next_task) that nothing else uses."""
    rows = word(matrix, ROWS)
    blocks = (rows + ROW_BLOCK - 1) // ROW_BLOCK
    product = word(matrix, FEW) if n <= FEW_ROWS else word(matrix, MANY)
    num_parts = parts_of(team, blocks)
    part = next_task(team, counter)
    while part < num_parts:
        first, last = part_of(team, blocks, part, num_parts)
        arguments = (
            word(matrix, DATA), word(matrix, COLUMNS),
            first * ROW_BLOCK, min(last * ROW_BLOCK, rows),
            prepared, 0, 1, n, y, 0, ldy, word(matrix, BIAS),
        )  # fmt: skip
        call_kernel(product, arguments)
        part = next_task(team, counter)


@inner
def multiply_heads(matrix, num_heads, prepared, n, head_rows, y, ldy, team, counter):
    """The same where each head has rows of the matrix, and rows of activations, of its own: the
    matrix's rows are those of head 0, then of head 1, ...; `head_rows` (address of int32
    [num_heads, n]) says which prepared rows belong to a head, and which rows of y (`ldy` float32
    apart) their results go to."""
    per_head = word(matrix, ROWS) // num_heads
    blocks = (per_head + ROW_BLOCK - 1) // ROW_BLOCK
    product = word(matrix, FEW) if n <= FEW_ROWS else word(matrix, MANY)
    num_parts = parts_of(team, num_heads * blocks)
    part = next_task(team, counter)
    while part < num_parts:
        task, end = part_of(team, num_heads * blocks, part, num_parts)
        while task < end:
            head, block = task // blocks, task % blocks
            stop = min(block + end - task, blocks)
            weights = word(matrix, DATA) + head * per_head * word(matrix, ROW_BYTES)
            rows, last = head_rows + 4 * head * n, min(stop * ROW_BLOCK, per_head)
            arguments = (
                weights, word(matrix, COLUMNS), block * ROW_BLOCK, last,
                prepared, rows, 1, n, y, rows, ldy, 0,
            )  # fmt: skip
            call_kernel(product, arguments)
            task += stop - block
        part = next_task(team, counter)


@inner
def gather_rows(matrix, ids, n, y, ldy, thread, num_threads):
    """This thread's share of the rows ids (address of int32 [n]) of a matrix, as float32."""
    first, last = share(n, thread, num_threads)
    k = word(matrix, COLUMNS)
    for i in range(first, last):
        row = np.int64(load_i32(ids, i))
        target = y + 4 * i * ldy
        arguments = (word(matrix, DATA), k, row, row + 1, 0, 0, 1, 1, target, 0, 0, 0)
        call_kernel(word(matrix, DEQUANTIZE), arguments)


__all__ = [
    "FEW_ROWS",
    "Matrix",
    "gather_rows",
    "multiply",
    "multiply_heads",
    "prepare_activations",
    "prepared_bytes",
]
