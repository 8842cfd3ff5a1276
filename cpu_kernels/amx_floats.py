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
from cpu_kernels.memory import load_f32, stack, store_f32, store_word, word
from cpu_kernels.products import source_row, target_row
from cpu_kernels.simd import Emitter, Value, emitted, f32, i32, i64

COLUMNS = 2 * SIDE  # of weights, in a tile
TILES_BYTES = 1 << 20  # of activations at once: half of the second-level cache
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
def _make_tiles(x, x_bytes, x_rows, divisor, begin, stop, num_tiles, tiles, sources):
    """Of rows begin to stop, SIDE at a time; the last one comes again."""
    for block in range((stop - begin + SIDE - 1) // SIDE):
        for i in range(SIDE):
            row = source_row(x_rows, divisor, min(begin + SIDE * block + i, stop - 1))
            store_word(sources, i, x + x_bytes * row)
        _split_rows(sources, num_tiles, tiles + block * num_tiles * (2 * TILE_BYTES))


def make_amx_floats(isa: str, format: str) -> Callable:
    tiles_room, sums_room = str(TILES_BYTES), str(ROW_TILES * TILE_BYTES)
    spare_room = str(SPARE_BYTES)

    def amx_floats(weights, k, first, last, prepared, x_rows, divisor, n, y, y_rows, ldy, bias):
        row_bytes, num_tiles = 2 * k, k // COLUMNS
        x, x_bytes = word(prepared, 0), word(prepared, 1)
        tiles, sums, sources = stack(tiles_room), stack(sums_room), stack("128")
        targets, spare = stack("128"), stack(spare_room)
        prepare_spare(spare)
        columns = 1 if n == 1 else SIDE
        shaped = SIDE
        shape_tiles(SIDE, columns)
        at_once = TILES_BYTES // (2 * TILE_BYTES) // num_tiles * SIDE
        for begin in range(0, n, at_once):
            stop = min(begin + at_once, n)
            if n == 1:
                _split_row(x + x_bytes * source_row(x_rows, divisor, 0), num_tiles, tiles)
            else:
                _make_tiles(x, x_bytes, x_rows, divisor, begin, stop, num_tiles, tiles, sources)
            row = first
            while row < last:
                many = n > SIDE and last - row >= SIDE * ROW_TILES
                rows = SIDE * ROW_TILES if many else min(SIDE, last - row)
                at, next_bytes = weights + row * row_bytes, 0
                if begin == 0:
                    next_bytes = min(rows, last - row - rows) * row_bytes
                if min(rows, SIDE) != shaped:
                    shaped = rows
                    shape_tiles(rows, columns)
                for token in range(begin, stop, SIDE):
                    for i in range(rows if bias != 0 else 0):
                        for column in range(columns):
                            store_f32(sums, columns * i + column, load_f32(bias, row + i))
                    source = tiles + (token - begin) // SIDE * num_tiles * (2 * TILE_BYTES)
                    if many:
                        multiply_tiles(
                            "4", at, row_bytes, num_tiles, source, columns, sums, bias == 0,
                            rows * row_bytes, next_bytes,
                        )  # fmt: skip
                    else:
                        multiply_tiles(
                            "1", at, row_bytes, num_tiles, source, columns, sums, bias == 0,
                            rows * row_bytes, next_bytes,
                        )  # fmt: skip
                    next_bytes = 0
                    if n == 1:
                        copy_row(sums, target_row(y, y_rows, ldy, 0) + 4 * row, rows)
                        continue
                    for i in range(SIDE):
                        target = target_row(y, y_rows, ldy, min(token + i, stop - 1))
                        store_word(targets, i, target)
                    for i in range(0, rows, SIDE):
                        tile = sums + TILE_BYTES // SIDE * i
                        store_tile(tile, targets, row + i, min(rows, SIDE), spare)
                row += rows
        end_tiles()

    return amx_floats
