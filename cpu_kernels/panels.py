"""Kernels for many rows of activations, from panels (see gemm.py); called as products.py says."""

from __future__ import annotations

from collections.abc import Callable

from numba import njit

from cpu_kernels.activations import CHUNK, CHUNK_BYTES, GROUP, HEADER_BYTES
from cpu_kernels.dequantize import dequantize_floats, floats_to_float32
from cpu_kernels.formats import FORMATS
from cpu_kernels.gemm import (
    group_bytes,
    multiply_float_panel,
    multiply_panel,
    pack_floats,
    pack_row,
)
from cpu_kernels.groups import GROUPS
from cpu_kernels.isa import ISAS
from cpu_kernels.memory import load_f32, stack, store_f32, store_word, word
from cpu_kernels.products import source_row, target_row

ROWS_AT_ONCE = 32  # of weights: their panels stay in the L2 cache while all activations pass
CHUNKS_AT_ONCE = 8  # of each row; 2048 weights
FLOATS_AT_ONCE = 512


@njit(inline="always")
def _add_tile(tile, width, y, y_rows, ldy, bias, token, num_tokens, first_row, num_rows, fresh):
    """Put a tile where it belongs: over what was there, if `fresh`, else added to it."""
    for t in range(num_tokens):
        target = target_row(y, y_rows, ldy, token + t)
        for r in range(num_rows):
            value = load_f32(tile, t * width + r)
            if not fresh:
                value += load_f32(target, first_row + r)
            elif bias != 0:
                value += load_f32(bias, first_row + r)
            store_f32(target, first_row + r, value)


@njit(inline="always")
def _find_sources(sources, x, x_bytes, x_rows, divisor, first, num_tokens, n):
    """Addresses of the next rows of activations; the last one again after the end."""
    for t in range(num_tokens):
        row = source_row(x_rows, divisor, min(first + t, n - 1))
        store_word(sources, t, x + x_bytes * row)


def make_gemm(isa: str, format: str) -> Callable:
    """Quantized weights and activations."""
    block, block_bytes = FORMATS[format].block_size, FORMATS[format].block_bytes
    width, tokens = ISAS[isa].panel_rows, ISAS[isa].panel_tokens
    panel_bytes = CHUNKS_AT_ONCE * GROUPS * group_bytes(isa, format)
    room = str(panel_bytes * ROWS_AT_ONCE // width)

    def gemm(weights, k, first, last, prepared, x_rows, divisor, n, y, y_rows, ldy, bias):
        row_bytes = k // block * block_bytes
        num_groups = k // GROUP
        num_chunks = (k + CHUNK - 1) // CHUNK
        x_bytes = word(prepared, 4)
        x = prepared + HEADER_BYTES
        panels = stack(room)
        tile = stack("1024")
        sources = stack("128")
        for row in range(first, last, ROWS_AT_ONCE):
            num_rows = min(ROWS_AT_ONCE, last - row)
            num_panels = (num_rows + width - 1) // width
            for start in range(0, num_chunks, CHUNKS_AT_ONCE):
                chunks = min(CHUNKS_AT_ONCE, num_chunks - start)
                for r in range(num_panels * width):
                    # the last row again, where there are none left
                    at = weights + min(row + r, last - 1) * row_bytes
                    panel = panels + r // width * panel_bytes
                    pack_row(isa, format, at, num_groups, start, chunks, panel, r % width)
                for token in range(0, n, tokens):
                    _find_sources(sources, x, x_bytes, x_rows, divisor, token, tokens, n)
                    for p in range(num_panels):
                        panel = panels + p * panel_bytes
                        position = start * CHUNK_BYTES
                        multiply_panel(isa, format, panel, chunks, sources, position, tile)
                        _add_tile(
                            tile, width, y, y_rows, ldy, bias, token, min(tokens, n - token),
                            row + p * width, min(width, last - row - p * width), start == 0,
                        )  # fmt: skip

    return gemm


def make_float_gemm(isa: str, format: str) -> Callable:
    """Weights of any format, as float32, with float32 activations."""
    block, block_bytes = FORMATS[format].block_size, FORMATS[format].block_bytes
    is_float = FORMATS[format].is_float
    width, tokens = ISAS[isa].panel_rows, ISAS[isa].panel_tokens
    panel_bytes = FLOATS_AT_ONCE * 4 * width
    room = str(panel_bytes * ROWS_AT_ONCE // width)

    def float_gemm(weights, k, first, last, prepared, x_rows, divisor, n, y, y_rows, ldy, bias):
        row_bytes = k // block * block_bytes
        x = word(prepared, 0)
        x_bytes = word(prepared, 1)
        panels = stack(room)
        values = stack("2048")
        tile = stack("1024")
        sources = stack("128")
        for row in range(first, last, ROWS_AT_ONCE):
            num_rows = min(ROWS_AT_ONCE, last - row)
            num_panels = (num_rows + width - 1) // width
            for start in range(0, k, FLOATS_AT_ONCE):
                count = min(FLOATS_AT_ONCE, k - start)
                for r in range(num_panels * width):
                    at = weights + min(row + r, last - 1) * row_bytes
                    if is_float:
                        floats_to_float32(format, at + start * block_bytes, count, values)
                    else:
                        dequantize_floats(format, at, k, start, count, values)
                    pack_floats(isa, values, count, panels + r // width * panel_bytes, r % width)
                for token in range(0, n, tokens):
                    _find_sources(sources, x, x_bytes, x_rows, divisor, token, tokens, n)
                    for p in range(num_panels):
                        panel = panels + p * panel_bytes
                        multiply_float_panel(isa, panel, count, sources, 4 * start, tile)
                        _add_tile(
                            tile, width, y, y_rows, ldy, bias, token, min(tokens, n - token),
                            row + p * width, min(width, last - row - p * width), start == 0,
                        )  # fmt: skip

    return float_gemm
