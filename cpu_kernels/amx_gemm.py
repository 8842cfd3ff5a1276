"""The kernel for many rows of activations where there is AMX (see amx.py and products.py).

Rows of weights are taken ROWS at a time, and decoded chunk by chunk while the chunk before is
multiplied with all activations: in all, weights are read once, in order, and what they become never
leaves the first-level cache. Activations stay in the second-level one, as many as it has room for;
rows that do not follow each other are copied, as tiles are loaded from equal distances.
"""

from __future__ import annotations

from collections.abc import Callable

from cpu_kernels.activations import CHUNK, GROUP, GROUPS
from cpu_kernels.amx import (
    LINE,
    PANEL_BYTES,
    ROWS,
    SIDE,
    SUM_BYTES,
    TOKENS,
    begin_tiles,
    clear_row,
    copy_lines,
    end_tiles,
    multiply_and_pack,
    multiply_groups,
)
from cpu_kernels.compiler import inner
from cpu_kernels.formats import FORMATS
from cpu_kernels.gemm import copy_row
from cpu_kernels.memory import stack, word
from cpu_kernels.products import source_row, target_row

TOKENS_AT_ONCE = 256
CHUNKS_AT_ONCE = 64  # of TOKENS rows of activations: half of the second-level cache
CHUNK_BYTES = 2 * CHUNK
COPIES_ROOM = TOKENS * (CHUNKS_AT_ONCE * CHUNK_BYTES + TOKENS_AT_ONCE // TOKENS * LINE)


@inner
def _are_in_order(x_rows, divisor, n):
    """Whether so many rows of activations follow each other in memory."""
    first, num_in_order = source_row(x_rows, divisor, 0), 0
    for i in range(n):
        num_in_order += source_row(x_rows, divisor, i) == first + i
    return num_in_order == n


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
    room, sums_room = str(4 * PANEL_BYTES), str(TOKENS_AT_ONCE // TOKENS * SUM_BYTES)
    copies_room = str(COPIES_ROOM)

    def amx_gemm(weights, k, first, last, prepared, x_rows, divisor, n, y, y_rows, ldy, bias):
        row_bytes = k // block * block_bytes
        num_groups = k // GROUP
        num_chunks = (k + CHUNK - 1) // CHUNK
        rows, rows_bytes = word(prepared, 5), word(prepared, 6)
        end = weights + row_bytes * (last - 1)
        panels, sums, copies = stack(room), stack(sums_room), stack(copies_room)
        in_order = _are_in_order(x_rows, divisor, n)
        begin_tiles()
        for begin in range(0, n, TOKENS_AT_ONCE):
            stop = min(begin + TOKENS_AT_ONCE, n)
            num_tiles = (stop - begin + TOKENS - 1) // TOKENS
            at_once = min(CHUNKS_AT_ONCE // num_tiles, num_chunks)
            for start in range(0, num_chunks, at_once):
                chunks = min(at_once, num_chunks - start)
                x, x_bytes = rows + source_row(x_rows, divisor, begin) * rows_bytes, rows_bytes
                x += CHUNK_BYTES * start
                if not in_order:
                    x, x_bytes = copies, CHUNK_BYTES * chunks + LINE
                    for i in range(stop - begin):
                        row = rows + source_row(x_rows, divisor, begin + i) * rows_bytes
                        at = row + CHUNK_BYTES * start
                        copy_lines(at, copies + x_bytes * i, CHUNK_BYTES // LINE * chunks)
                num_steps = (last - first + ROWS - 1) // ROWS * chunks
                for step in range(-1, num_steps):  # before the first one, weights are packed
                    row, chunk = first + ROWS * (step // chunks), step % chunks
                    num_rows, used = min(ROWS, last - row), num_tiles if step >= 0 else 0
                    next_row = first + ROWS * ((step + 1) // chunks)
                    next_chunk = start + (step + 1) % chunks
                    panel = panels + 2 * PANEL_BYTES * (step & 1)
                    next_panel = panels + 2 * PANEL_BYTES * ((step + 1) & 1)
                    source = x + CHUNK_BYTES * chunk
                    for t in range(used if chunk == 0 else 0):
                        token, total = begin + TOKENS * t, sums + SUM_BYTES * t
                        tokens = min(TOKENS, stop - token)
                        _begin_sums(
                            total, y, y_rows, ldy, bias, token, tokens, row, num_rows, start == 0
                        )
                    for half in range(2):
                        group, begin_row = GROUPS // 2 * half, next_row + SIDE * half
                        if step + 1 < num_steps and begin_row < last:
                            at = weights + row_bytes * begin_row
                            multiply_and_pack(
                                isa, format, panel, source, x_bytes, sums, group, at, row_bytes,
                                end, num_groups, next_chunk, next_panel + PANEL_BYTES * half,
                            )  # fmt: skip
                        else:
                            multiply_groups(panel, source, x_bytes, sums, group, GROUPS // 2)
                    for t in range(1, used):
                        source += x_bytes * TOKENS
                        multiply_groups(panel, source, x_bytes, sums + SUM_BYTES * t, 0, GROUPS)
                    for t in range(used if chunk == chunks - 1 else 0):
                        token, total = begin + TOKENS * t, sums + SUM_BYTES * t
                        tokens = min(TOKENS, stop - token)
                        _end_sums(total, y, y_rows, ldy, token, tokens, row, num_rows)
        end_tiles()

    return amx_gemm
