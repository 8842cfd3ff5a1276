"""The kernel for many rows of activations where there is AMX (see amx.py and products.py).

Rows of weights are taken ROWS at a time, and decoded chunk by chunk while the chunk before is
multiplied with all activations: in all, weights are read once, in order, and what they become never
leaves the first-level cache. Activations stay in the second-level one: SOURCES_ROOM bytes of them.
"""

from __future__ import annotations

from collections.abc import Callable

from cpu_kernels.activations import CHUNK, GROUP, GROUPS
from cpu_kernels.amx import (
    PANEL_BYTES,
    ROWS,
    SIDE,
    SOURCE_BYTES,
    SUM_BYTES,
    TOKENS,
    begin_tiles,
    clear_row,
    copy_activations,
    end_tiles,
    multiply_and_pack,
    multiply_chunk,
)
from cpu_kernels.compiler import inner
from cpu_kernels.formats import FORMATS
from cpu_kernels.gemm import copy_row
from cpu_kernels.memory import stack, word
from cpu_kernels.panels import find_sources
from cpu_kernels.products import target_row

SOURCES_ROOM = 1 << 20  # half of the second-level cache of processors with AMX
TOKENS_AT_ONCE = 256  # rows of activations, of 2048 columns


@inner
def _begin_sums(sums, y, y_rows, ldy, bias, token, num_tokens, first_row, num_rows, fresh):
    """What is added to: nothing or the bias, if `fresh`, else what is there."""
    for t in range(num_tokens):
        target = sums + 4 * t * ROWS
        if not fresh:
            copy_row(target_row(y, y_rows, ldy, token + t) + 4 * first_row, target, num_rows)
        elif bias != 0:
            copy_row(bias + 4 * first_row, target, num_rows)
        else:
            clear_row(target)


@inner
def _end_sums(sums, y, y_rows, ldy, token, num_tokens, first_row, num_rows):
    for t in range(num_tokens):
        target = target_row(y, y_rows, ldy, token + t) + 4 * first_row
        copy_row(sums + 4 * t * ROWS, target, num_rows)


def make_amx_gemm(isa: str, format: str) -> Callable:
    """Quantized weights with activations as bfloat16, by AMX."""
    block, block_bytes = FORMATS[format].block_size, FORMATS[format].block_bytes
    room, sums_room = str(4 * PANEL_BYTES), str((TOKENS_AT_ONCE // TOKENS + 1) * SUM_BYTES)
    copies_room = str(SOURCES_ROOM)

    def amx_gemm(weights, k, first, last, prepared, x_rows, divisor, n, y, y_rows, ldy, bias):
        row_bytes = k // block * block_bytes
        num_groups = k // GROUP
        num_chunks = (k + CHUNK - 1) // CHUNK
        x = word(prepared, 0)
        x_bytes = word(prepared, 1)
        end = weights + row_bytes * (last - 1)
        panels, sums, copies = stack(room), stack(sums_room), stack(copies_room)
        sources = stack("256")
        begin_tiles()
        for begin in range(0, n, TOKENS_AT_ONCE):
            stop = min(begin + TOKENS_AT_ONCE, n)
            num_tiles = (stop - begin + TOKENS - 1) // TOKENS
            at_once = min(SOURCES_ROOM // SOURCE_BYTES // num_tiles, num_chunks)
            for start in range(0, num_chunks, at_once):
                chunks = min(at_once, num_chunks - start)
                groups = min(chunks * GROUPS, num_groups - start * GROUPS)
                for t in range(num_tiles):
                    token = begin + TOKENS * t
                    tokens = min(TOKENS, stop - token)
                    at = x + 4 * CHUNK * start
                    find_sources(sources, at, x_bytes, x_rows, divisor, token, tokens, n)
                    copy_activations(sources, tokens, groups, copies + SOURCE_BYTES * chunks * t)
                num_steps = (last - first + ROWS - 1) // ROWS * chunks
                for step in range(-1, num_steps):  # before the first one, weights are packed
                    row, chunk = first + ROWS * (step // chunks), step % chunks
                    num_rows, used = min(ROWS, last - row), num_tiles if step >= 0 else 0
                    next_row = first + ROWS * ((step + 1) // chunks)
                    next_chunk = start + (step + 1) % chunks
                    panel = panels + 2 * PANEL_BYTES * (step & 1)
                    next_panel = panels + 2 * PANEL_BYTES * ((step + 1) & 1)
                    for t in range(max(used, 2)):
                        token, total = begin + TOKENS * t, sums + SUM_BYTES * t
                        tokens = min(TOKENS, stop - token)
                        source = copies  # whatever it has, if nothing is multiplied
                        if t < used:
                            source += SOURCE_BYTES * (chunks * t + chunk)
                        if t < used and chunk == 0:
                            _begin_sums(
                                total, y, y_rows, ldy, bias, token, tokens, row, num_rows,
                                start == 0,
                            )  # fmt: skip
                        begin_row = next_row + SIDE * t
                        if t < 2 and step + 1 < num_steps and begin_row < last:
                            at = weights + row_bytes * begin_row
                            multiply_and_pack(
                                isa, format, panel, source, total, at, row_bytes, end, num_groups,
                                next_chunk, next_panel + PANEL_BYTES * t,
                            )  # fmt: skip
                        elif t < used:
                            multiply_chunk(panel, source, total)
                        if t < used and chunk == chunks - 1:
                            _end_sums(total, y, y_rows, ldy, token, tokens, row, num_rows)
        end_tiles()

    return amx_gemm
