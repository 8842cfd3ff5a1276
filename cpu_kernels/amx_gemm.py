"""The kernel for many rows of activations where there is AMX (see amx.py and products.py).

Rows of weights are taken ROWS at a time, and decoded chunk by chunk while the chunk before is
multiplied with all activations: in all, weights are read once, in order, and what they become never
leaves the first-level cache. Activations stay in the second-level one, as many as it has room for;
of rows that are chosen, tiles are made here.
"""

from __future__ import annotations

from collections.abc import Callable

from cpu_kernels.activations import CHUNK, GROUP, GROUPS, SIDE, TILE_BYTES
from cpu_kernels.amx import (
    PANEL_BYTES,
    ROWS,
    SUM_BYTES,
    TOKENS,
    end_tiles,
    gather_tiles,
    multiply_and_decode,
    multiply_chunk,
    shape_tiles,
)
from cpu_kernels.amx_sums import (
    LINE,
    SPARE_BYTES,
    biased_tile,
    load_tile,
    prepare_spare,
    store_tile,
)
from cpu_kernels.compiler import inner
from cpu_kernels.formats import FORMATS
from cpu_kernels.memory import stack, word
from cpu_kernels.products import find_sources, find_targets

TOKENS_AT_ONCE = 256
CHUNKS_AT_ONCE = 64  # of TOKENS rows of activations: half of the second-level cache
CHUNK_BYTES = GROUPS * TILE_BYTES  # of SIDE rows of activations
COPIES_ROOM = TOKENS // SIDE * CHUNKS_AT_ONCE * CHUNK_BYTES


@inner
def _make_tiles(rows, row_bytes, x_rows, divisor, begin, stop, start, num_chunks, copies):
    """Tiles of chosen rows of activations, some chunks of them; the last row comes again."""
    sources = stack("128")
    for block in range((stop - begin + TOKENS - 1) // TOKENS * (TOKENS // SIDE)):
        first = begin + SIDE * block
        find_sources(sources, rows, row_bytes, x_rows, divisor, first, SIDE, stop)
        at = copies + block * num_chunks * CHUNK_BYTES
        gather_tiles(sources, CHUNK // GROUP * LINE * start, GROUPS * num_chunks, at)


@inner
def _begin_sums(sums, targets, bias, row, num_rows, fresh, spare):
    """What is added to: the bias, if `fresh`, else what is at `targets`."""
    for i in range(SUM_BYTES // TILE_BYTES):
        tile, first = sums + TILE_BYTES * i, row + SIDE * (i // 2)
        rows = min(num_rows - SIDE * (i // 2), SIDE)
        if fresh:
            biased_tile(tile, bias, first, rows)
        else:
            load_tile(tile, targets + 8 * SIDE * (i % 2), first, rows, spare)


@inner
def _end_sums(sums, targets, row, num_rows, spare):
    for i in range(SUM_BYTES // TILE_BYTES):
        tile, first = sums + TILE_BYTES * i, row + SIDE * (i // 2)
        rows = min(num_rows - SIDE * (i // 2), SIDE)
        store_tile(tile, targets + 8 * SIDE * (i % 2), first, rows, spare)


def make_amx_gemm(isa: str, format: str) -> Callable:
    """Quantized weights with activations as bfloat16, by AMX."""
    block, nbytes = FORMATS[format].block_size, FORMATS[format].block_bytes
    room, sums_room = str(4 * PANEL_BYTES), str(TOKENS_AT_ONCE // TOKENS * SUM_BYTES)
    copies_room, targets_room = str(COPIES_ROOM), str(8 * TOKENS_AT_ONCE)
    spare_room = str(SPARE_BYTES)

    def amx_gemm(weights, k, first, last, prepared, x_rows, divisor, n, y, y_rows, ldy, bias):
        row_bytes = k // block * nbytes
        num_groups = k // GROUP
        num_chunks = (k + CHUNK - 1) // CHUNK
        rounded, rounded_bytes = word(prepared, 5), word(prepared, 6)
        end = weights + row_bytes * (last - 1)
        panels, sums, copies = stack(room), stack(sums_room), stack(copies_room)
        targets, spare = stack(targets_room), stack(spare_room)
        prepare_spare(spare)
        shape_tiles(SIDE, SIDE)
        for begin in range(0, n, TOKENS_AT_ONCE):
            stop = min(begin + TOKENS_AT_ONCE, n)
            num_tiles = (stop - begin + TOKENS - 1) // TOKENS
            # What comes again is stored again: the same.
            find_targets(targets, y, y_rows, ldy, begin, num_tiles * TOKENS, stop)
            at_once = min(CHUNKS_AT_ONCE // num_tiles, num_chunks)
            for start in range(0, num_chunks, at_once):
                chunks = min(at_once, num_chunks - start)
                if x_rows == 0:
                    x_bytes = num_chunks * CHUNK_BYTES
                    x = rounded + begin // SIDE * x_bytes + CHUNK_BYTES * start
                else:
                    x_bytes = chunks * CHUNK_BYTES
                    x = copies
                    _make_tiles(
                        rounded, rounded_bytes, x_rows, divisor, begin, stop, start, chunks, x
                    )
                num_steps = (last - first + ROWS - 1) // ROWS * chunks
                for step in range(-1, num_steps):  # before the first one, weights are decoded
                    row, chunk = first + ROWS * (step // chunks), step % chunks
                    num_rows, used = min(ROWS, last - row), num_tiles if step >= 0 else 0
                    next_row = first + ROWS * ((step + 1) // chunks)
                    next_chunk = start + (step + 1) % chunks
                    panel = panels + 2 * PANEL_BYTES * (step & 1)
                    next_panel = panels + 2 * PANEL_BYTES * ((step + 1) & 1)
                    source = x + CHUNK_BYTES * chunk
                    fresh = chunk == 0 and start == 0 and bias == 0
                    for t in range(used if chunk == 0 and not fresh else 0):
                        _begin_sums(
                            sums + SUM_BYTES * t, targets + 8 * TOKENS * t, bias, row, num_rows,
                            start == 0, spare,
                        )  # fmt: skip
                    for t in range(max(used, 2)):
                        total, tiles = sums + SUM_BYTES * t, source + 2 * x_bytes * t
                        begin_row = next_row + SIDE * t
                        if t < 2 and step + 1 < num_steps and begin_row < last:
                            multiply_and_decode(
                                isa, format, panel, tiles, x_bytes, total, fresh, t < used,
                                weights + row_bytes * begin_row, row_bytes, end, num_groups,
                                next_chunk, next_panel + PANEL_BYTES * t,
                            )  # fmt: skip
                        elif t < used:
                            multiply_chunk(panel, tiles, x_bytes, total, fresh)
                        if t < used and chunk == chunks - 1:
                            _end_sums(total, targets + 8 * TOKENS * t, row, num_rows, spare)
        end_tiles()

    return amx_gemm
