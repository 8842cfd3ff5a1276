"""Any number of rows of activations times bfloat16 weights, with AMX.

Rows of weights are left tiles as they are in memory. Activations are split in two bfloat16, which
together have 16 of a float32's 24 significant bits, and are right tiles: each has 16 pairs of
values of a few rows. A sum is one chain along its row, whatever else is in the tiles, so that any
number of rows gives each of them the same bits; few take as long as memory does.
"""

from __future__ import annotations

from collections.abc import Callable

from cpu_kernels.activations import SIDE, TILE_BYTES
from cpu_kernels.amx import end_tiles, multiply_tiles, shape_tiles
from cpu_kernels.amx_sums import LINE, SPARE_BYTES, prepare_spare, store_tile
from cpu_kernels.bfloat16 import plain_nan, side_by_side
from cpu_kernels.compiler import inner
from cpu_kernels.gemm import copy_row
from cpu_kernels.memory import load_f32, stack, store_f32, word
from cpu_kernels.products import find_sources, find_targets, source_row
from cpu_kernels.simd import Emitter, Value, emitted, f32, i32, i64

COLUMNS = 2 * SIDE  # of weights, in a tile
TILES_BYTES = 1 << 20  # of activations at once: half of the second-level cache
TOKENS_AT_ONCE = 256
MOST_COLUMNS = TILES_BYTES // (2 * TILE_BYTES) * COLUMNS
ROW_TILES = 4  # of weights at once, where products take longer than memory


def fits(shape: tuple[int, int]) -> bool:
    """Whether a matrix can be multiplied."""
    return shape[1] % COLUMNS == 0 and shape[1] <= MOST_COLUMNS


def _split(k: Emitter, x: Value) -> tuple[Value, Value]:
    """The 32 float32 at `x` as the nearest bfloat16, and what those lack as others: i32 [16]."""
    halves = [plain_nan(k, k.load(x + LINE * half, f32(SIDE))) for half in (0, 1)]
    near = side_by_side(k, *halves)
    back = [k.shuffle(near, mask=range(start, start + SIDE)) for start in (0, SIDE)]
    words = [half.cast("zext", i32) << 16 for half in back]
    lacking = [half - word.view(f32(SIDE)) for half, word in zip(halves, words, strict=True)]
    return near.view(i32(SIDE)), side_by_side(k, *lacking).view(i32(SIDE))


@emitted("void", "i64 i64 i64")
def _split_row(k, x, num_tiles, target):
    """Tiles of one row of activations: a line each, of what is near and what that lacks."""
    with k.loop(num_tiles) as i:
        for number, line in enumerate(_split(k, x + i * (2 * LINE))):
            k.store(target + (i * (2 * LINE) + LINE * number), line)


@emitted("void", "i64 i64 i64")
def _split_rows(k, sources, num_tiles, target):
    """The same of SIDE rows, whose addresses are at `sources`: SIDE lines each."""
    rows = [k.load(sources + 8 * row, i64(1)) for row in range(SIDE)]
    with k.loop(num_tiles) as i:
        kinds = zip(*(_split(k, row + i * (2 * LINE)) for row in rows), strict=True)
        for kind, lines in enumerate(kinds):
            for number, line in enumerate(k.transpose_square(lines)):
                k.store(target + (i * (2 * TILE_BYTES) + TILE_BYTES * kind + LINE * number), line)


@inner
def _make_tiles(x, x_bytes, x_rows, divisor, begin, stop, num_tiles, tiles):
    """Of rows begin to stop, SIDE at a time; the last one comes again."""
    sources = stack("128")
    for block in range((stop - begin + SIDE - 1) // SIDE):
        find_sources(sources, x, x_bytes, x_rows, divisor, begin + SIDE * block, SIDE, stop)
        _split_rows(sources, num_tiles, tiles + block * num_tiles * (2 * TILE_BYTES))


@inner
def _begin_sums(sums, bias, row, num_rows, columns):
    for i in range(num_rows):
        for column in range(columns):
            store_f32(sums, columns * i + column, load_f32(bias, row + i))


@inner
def _end_sums(sums, targets, row, num_rows, columns, spare):
    if columns == 1:
        copy_row(sums, word(targets, 0) + 4 * row, num_rows)
    else:
        for i in range(0, num_rows, SIDE):
            tile = sums + TILE_BYTES // SIDE * i
            store_tile(tile, targets, row + i, min(num_rows, SIDE), spare)


def make_amx_floats(isa: str, format: str) -> Callable:
    """Weights in bfloat16 with float32 activations, by AMX."""
    tiles_room, sums_room = str(TILES_BYTES), str(ROW_TILES * TILE_BYTES)
    spare_room, targets_room = str(SPARE_BYTES), str(8 * TOKENS_AT_ONCE)

    def amx_floats(weights, k, first, last, prepared, x_rows, divisor, n, y, y_rows, ldy, bias):
        row_bytes, num_tiles = 2 * k, k // COLUMNS
        x, x_bytes = word(prepared, 0), word(prepared, 1)
        tiles, sums = stack(tiles_room), stack(sums_room)
        targets, spare = stack(targets_room), stack(spare_room)
        prepare_spare(spare)
        columns = 1 if n == 1 else SIDE
        shaped = SIDE
        shape_tiles(SIDE, columns)
        at_once = min(TILES_BYTES // (2 * TILE_BYTES) // num_tiles * SIDE, TOKENS_AT_ONCE)
        for begin in range(0, n, at_once):
            stop = min(begin + at_once, n)
            num_blocks = (stop - begin + SIDE - 1) // SIDE
            find_targets(targets, y, y_rows, ldy, begin, SIDE * num_blocks, stop)
            if n == 1:
                _split_row(x + x_bytes * source_row(x_rows, divisor, 0), num_tiles, tiles)
            else:
                _make_tiles(x, x_bytes, x_rows, divisor, begin, stop, num_tiles, tiles)
            row = first
            while row < last:
                many = n > SIDE and last - row >= SIDE * ROW_TILES
                rows = SIDE * ROW_TILES if many else min(SIDE, last - row)
                if min(rows, SIDE) != shaped:
                    shaped = rows
                    shape_tiles(rows, columns)
                at = weights + row * row_bytes
                next_bytes = min(rows, last - row - rows) * row_bytes if begin == 0 else 0
                for block in range(num_blocks):
                    source, fresh = tiles + block * num_tiles * (2 * TILE_BYTES), bias == 0
                    if not fresh:
                        _begin_sums(sums, bias, row, rows, columns)
                    if many:
                        multiply_tiles(
                            "4", at, row_bytes, num_tiles, source, columns, sums, fresh, next_bytes
                        )
                    else:
                        multiply_tiles(
                            "1", at, row_bytes, num_tiles, source, columns, sums, fresh, next_bytes
                        )
                    next_bytes = 0  # once is enough
                    _end_sums(sums, targets + 8 * SIDE * block, row, rows, columns, spare)
                row += rows
        end_tiles()

    return amx_floats
