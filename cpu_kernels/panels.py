"""Kernels for many rows of activations, from panels (see gemm.py); called as products.py says."""

from __future__ import annotations

from collections.abc import Callable

from cpu_kernels.activations import CHUNK, CHUNK_BYTES, GROUP, HEADER_BYTES
from cpu_kernels.compiler import inner
from cpu_kernels.dequantize import dequantize_floats, floats_to_float32
from cpu_kernels.few_rows import LANE
from cpu_kernels.formats import FORMATS
from cpu_kernels.gemm import (
    add_row,
    copy_row,
    multiply_float_panels,
    multiply_panels,
    prefetch_lines,
)
from cpu_kernels.isa import ISAS
from cpu_kernels.memory import stack, word
from cpu_kernels.pack import (
    CHUNKS_AT_ONCE,
    FLOATS_AT_ONCE,
    float_panel_bytes,
    pack_floats,
    pack_panel,
    panel_bytes,
)
from cpu_kernels.products import find_sources, target_row


@inner
def _add_tile(tile, width, y, y_rows, ldy, bias, token, num_tokens, first_row, num_rows, fresh):
    """Put a tile where it belongs: over what was there, if `fresh`, else added to it."""
    for t in range(num_tokens):
        source = tile + 4 * t * width
        target = target_row(y, y_rows, ldy, token + t) + 4 * first_row
        if not fresh:
            add_row(source, target, target, num_rows)
        elif bias != 0:
            add_row(source, bias + 4 * first_row, target, num_rows)
        else:
            copy_row(source, target, num_rows)


def make_gemm(isa: str, format: str) -> Callable:
    """Quantized weights and activations."""
    block, block_bytes = FORMATS[format].block_size, FORMATS[format].block_bytes
    panel_rows, tokens = ISAS[isa].panel_rows, ISAS[isa].panel_tokens
    width = ISAS[isa].panels * panel_rows  # of a tile
    at_once = ISAS[isa].rows_at_once
    nbytes = panel_bytes(isa, format)
    room = str(nbytes * at_once // panel_rows)

    def gemm(weights, k, first, last, prepared, x_rows, divisor, n, y, y_rows, ldy, bias):
        row_bytes = k // block * block_bytes
        num_groups = k // GROUP
        num_chunks = (k + CHUNK - 1) // CHUNK
        x_bytes = word(prepared, 4)
        x = prepared + HEADER_BYTES
        panels = stack(room)
        tile = stack("1024")
        sources = stack("128")
        for row in range(first, last, at_once):
            num_tiles = (min(at_once, last - row) + width - 1) // width
            ahead = weights + (row + at_once) * row_bytes
            size = row_bytes * max(min(at_once, last - row - at_once), 0)
            for start in range(0, num_chunks, CHUNKS_AT_ONCE):
                chunks = min(CHUNKS_AT_ONCE, num_chunks - start)
                for r in range(0, num_tiles * width, panel_rows):
                    at, end = weights + row_bytes * (row + r), weights + row_bytes * (last - 1)
                    panel = panels + r // panel_rows * nbytes
                    pack_panel(isa, format, at, row_bytes, end, num_groups, start, chunks, panel)
                for token in range(0, n, tokens):
                    at = x + start * CHUNK_BYTES
                    find_sources(sources, at, x_bytes, x_rows, divisor, token, tokens, n)
                    if start == 0:  # the rows that are packed next, little by little
                        prefetch_lines(
                            ahead + size * token // n, ahead + size * min(token + tokens, n) // n
                        )
                    for i in range(num_tiles):
                        panel = panels + i * (width // panel_rows) * nbytes
                        multiply_panels(isa, format, panel, chunks, sources, tile)
                        _add_tile(
                            tile, width, y, y_rows, ldy, bias, token, min(tokens, n - token),
                            row + i * width, min(width, last - row - i * width), start == 0,
                        )  # fmt: skip

    return gemm


def make_float_gemm(isa: str, format: str) -> Callable:
    """Weights of any format, as float32, with float32 activations."""
    block, block_bytes = FORMATS[format].block_size, FORMATS[format].block_bytes
    is_float = FORMATS[format].is_float
    panel_rows, tokens = ISAS[isa].panel_rows, ISAS[isa].float_tokens
    width = ISAS[isa].panels * panel_rows
    at_once = ISAS[isa].rows_at_once
    nbytes = float_panel_bytes(isa)
    room = str(nbytes * at_once // panel_rows)
    values_room = str(4 * FLOATS_AT_ONCE * LANE)

    def float_gemm(weights, k, first, last, prepared, x_rows, divisor, n, y, y_rows, ldy, bias):
        row_bytes = k // block * block_bytes
        x = word(prepared, 0)
        x_bytes = word(prepared, 1)
        panels = stack(room)
        values = stack(values_room)
        tile = stack("1024")
        sources = stack("128")
        for row in range(first, last, at_once):
            num_tiles = (min(at_once, last - row) + width - 1) // width
            for start in range(0, k, FLOATS_AT_ONCE):
                count = min(FLOATS_AT_ONCE, k - start)
                for r in range(num_tiles * width):
                    at = weights + min(row + r, last - 1) * row_bytes
                    decoded = values + r % LANE * (4 * FLOATS_AT_ONCE)
                    if is_float:
                        floats_to_float32(format, at + start * block_bytes, count, decoded)
                    else:
                        dequantize_floats(format, at, k, start, count, decoded)
                    if r % LANE == LANE - 1:
                        panel = panels + r // panel_rows * nbytes
                        pack_floats(isa, values, count, panel, (r - 3) % panel_rows)
                for token in range(0, n, tokens):
                    at = x + 4 * start
                    find_sources(sources, at, x_bytes, x_rows, divisor, token, tokens, n)
                    for i in range(num_tiles):
                        panel = panels + i * (width // panel_rows) * nbytes
                        multiply_float_panels(isa, panel, count, sources, tile)
                        _add_tile(
                            tile, width, y, y_rows, ldy, bias, token, min(tokens, n - token),
                            row + i * width, min(width, last - row - i * width), start == 0,
                        )  # fmt: skip

    return float_gemm
