"""Many rows of activations times quantized weights with AMX: 16 x 16 sums of products of bfloat16.

Weights are decoded to bfloat16, scales and all, once for all rows of activations, which are rounded
to the same: an error of 2^-9 of each, where that of int8 activations is about 2^-8 of the largest
in a group. Products are added in float32 inside the tiles, along the whole row. With integers, each
group's sums would have to be scaled and added by the vector units, which takes several times as
long as the products.

A tile is 16 lines of 64 bytes. One of weights has, in each line, a group of a row (see
rounded_weights.py); one of activations has, in each line, the same two values of every pair of 16
rows (see activations.py). Each sum is one chain along its row, whatever else is in the tiles.
"""

from __future__ import annotations

from collections.abc import Iterator

from llvmlite import ir

from cpu_kernels.activations import ROWS_OF_TILES, SIDE, TILE_BYTES
from cpu_kernels.amx_sums import LINE
from cpu_kernels.bfloat16 import rounded
from cpu_kernels.groups import GROUPS, chunk_bytes, row_of_chunks
from cpu_kernels.rounded_weights import FACTORS_BYTES, rounded_groups, store_factors
from cpu_kernels.simd import Emitter, Value, emitted, f32, i8, i16, i32, i64

TOKENS = ROWS_OF_TILES
ROWS = 2 * SIDE  # of weights that are multiplied at once
PANEL_BYTES = GROUPS * TILE_BYTES  # of a chunk of SIDE rows of weights
SUM_BYTES = 4 * TILE_BYTES  # of ROWS x TOKENS: the first TOKENS of the first SIDE rows, then others
ROWS_AT_ONCE = 2  # that are decoded while a group is multiplied


def _amx(k: Emitter, name: str, *arguments: Value | int) -> None:
    """Numbers are those of tiles."""
    values = [a if isinstance(a, Value) else k.constant(i8(1), a) for a in arguments]
    k.call(f"llvm.x86.{name}", ir.VoidType(), *values)


def _shape_tiles(k: Emitter, rows: Value, columns: Value) -> None:
    """Tell this thread's core the sizes of tiles: four for sums of so many rows and columns, two
    for so many rows of weights, and two for so many rows of activations."""
    memory, line, side = k.stack(LINE), k.integer(LINE), k.integer(SIDE)
    k.store(memory, k.constant(i8(LINE), [1] + [0] * (LINE - 1)))  # the palette
    sums, left, right = (rows, columns * 4), (rows, line), (side, columns * 4)
    for tile, (height, width) in enumerate([sums] * 4 + [left] * 2 + [right] * 2):
        k.store(memory + (16 + 2 * tile), width.cast("trunc", i16))
        k.store(memory + (48 + tile), height.cast("trunc", i8))
    _amx(k, "ldtilecfg", k.pointer(memory))


@emitted("void", "i64 i64")
def shape_tiles(k, rows, columns):
    """Tiles for this thread: of SIDE rows and columns, or fewer."""
    _shape_tiles(k, rows, columns)


@emitted("void", "")
def end_tiles(k):
    """Tiles that hold nothing need not be saved when threads take turns."""
    _amx(k, "tilerelease")


@emitted("void", "i64 i64 i64 i64")
def gather_tiles(k, sources, offset, count, target):
    """`count` tiles of activations, from `target` on: of SIDE rounded rows, whose addresses are at
    `sources`, the groups from `offset` bytes on."""
    rows = [k.load(sources + 8 * row, i64(1)) + offset for row in range(SIDE)]
    with k.loop(count) as i:
        lines = [k.load(row + i * LINE, i32(SIDE)) for row in rows]
        for number, line in enumerate(k.transpose_square(lines)):
            k.store(target + (i * TILE_BYTES + LINE * number), line)


class _Product:
    """Sums [ROWS, TOKENS] in four tiles, and a chunk that is added to them group by group: of two
    panels, and of rows of activations whose tiles are at `x`, the second ones `x_bytes` later."""

    def __init__(self, k: Emitter, panels: Value, x: Value, x_bytes: Value, sums: Value) -> None:
        self.k, self.panels, self.x, self.x_bytes, self.sums = k, panels, x, x_bytes, sums

    def begin(self, fresh: Value) -> None:
        """From nothing, if `fresh`, or what is there."""
        with self.k.when(fresh.compare("!=", 0)):
            for tile in range(4):
                _amx(self.k, "tilezero", tile)
        with self.k.when(fresh.compare("==", 0)):
            for tile in range(4):
                self._load(tile, self.sums + TILE_BYTES * tile)

    def add(self, group: Value) -> Iterator[None]:
        """Eight instructions, each written when the iterator is asked for the next."""
        for p, t in ((0, 0), (0, 1), (1, 0), (1, 1)):
            if t == 0:
                yield self._load(4 + p, self.panels + group * TILE_BYTES + PANEL_BYTES * p)
            if p == 0:
                yield self._load(6 + t, self.x + group * TILE_BYTES + self.x_bytes * t)
            yield _amx(self.k, "tdpbf16ps", 2 * p + t, 4 + p, 6 + t)

    def end(self) -> None:
        for tile in range(4):
            address = self.k.pointer(self.sums + TILE_BYTES * tile)
            _amx(self.k, "tilestored64", tile, address, self.k.integer(LINE))

    def _load(self, tile: int, address: Value) -> None:
        _amx(self.k, "tileloadd64", tile, self.k.pointer(address), self.k.integer(LINE))


@emitted("void", "i64 i64 i64 i64 i64")
def multiply_chunk(k, panels, x, x_bytes, sums, fresh):
    """sums += two panels times the tiles of TOKENS rows of activations: a chunk. If they are
    `fresh`, there were none before."""
    product = _Product(k, panels, x, x_bytes, sums)
    product.begin(fresh)
    with k.loop(k.integer(GROUPS)) as group:
        for _ in product.add(group):
            pass
    product.end()


@emitted("void", "i64 i64 i64 i64 i64 i64 i64 i64 i64 i64 i64 i64")
def multiply_and_decode(
    k, isa, format, panels, x, x_bytes, sums, fresh, multiplies, weights, row_bytes, last,
    num_groups, chunk, panel,
):  # fmt: skip
    """The same, if it `multiplies`, while the vector units, which have nothing to do for it, decode
    chunk number `chunk` of 16 rows of weights, which begin at `weights` and are `row_bytes` apart,
    into another `panel`. The row at `last` comes again where there are none left.

    Instructions of both kinds take turns one by one: the core has few spare tiles, and what comes
    after the next one to be loaded has to wait until there is one.
    """
    factors = k.stack(SIDE * FACTORS_BYTES)

    def chunk_of(row: Value) -> Value:
        start = k.minimum(weights + row_bytes * row, last)
        return row_of_chunks(k, format, start, num_groups).chunk(chunk)

    with k.loop(k.integer(SIDE)) as row:
        store_factors(k, format, chunk_of(row), factors + row * FACTORS_BYTES)
    product = _Product(k, panels, x, x_bytes, sums)
    with k.when(multiplies.compare("!=", 0)):
        product.begin(fresh)
    with k.loop(k.integer(GROUPS)) as group:
        steps = product.add(group)
        for i in range(ROWS_AT_ONCE):
            row = group * ROWS_AT_ONCE + i
            address = chunk_of(row)
            decoded = rounded_groups(k, isa, format, address, factors + row * FACTORS_BYTES)
            for number, register in enumerate(decoded):
                k.store(panel + row * LINE + TILE_BYTES * number, register)
                if number % ROWS_AT_ONCE:
                    with k.when(multiplies.compare("!=", 0)):
                        next(steps)
            for line in range(0, chunk_bytes(format), LINE):  # the next rows'
                k.prefetch(address + row_bytes * ROWS + line)
    with k.when(multiplies.compare("!=", 0)):
        product.end()


@emitted("void", "i64 i64 i64 i64 i64 i64 i64 i64")
def multiply_tiles(
    k, num_row_tiles, weights, row_bytes, num_tiles, x, columns, sums, fresh, next_bytes
):
    """sums (float32 [rows, columns]) += rows of bfloat16 weights, as many as there are in 1 to 4
    row tiles (a literal string), times `columns` rows of activations, whose tiles are at `x`: two
    for each of the weights'. If they are `fresh`, there were none before. So many bytes as come
    after these rows are wanted next."""
    numbers, width = range(int(num_row_tiles)), columns * 4
    places = [k.pointer(sums + width * (SIDE * number)) for number in numbers]
    with k.when(fresh.compare("!=", 0)):
        for number in numbers:
            _amx(k, "tilezero", number)
    with k.when(fresh.compare("==", 0)):
        for number in numbers:
            _amx(k, "tileloadd64", number, places[number], width)
    starts = [weights + row_bytes * (SIDE * number) for number in numbers]
    soon, pace = weights + row_bytes * (SIDE * len(numbers)), next_bytes // num_tiles
    with k.loop(num_tiles) as i:
        for kind in (0, 1):
            at = x + (i * 2 + kind) * SIDE * width
            _amx(k, "tileloadd64", 6 + kind, k.pointer(at), width)
        for number in numbers:
            left = 4 + number % 2
            _amx(k, "tileloadd64", left, k.pointer(starts[number] + i * LINE), row_bytes)
            for kind in (0, 1):
                _amx(k, "tdpbf16ps", number, left, 6 + kind)
        with k.loop((pace + LINE - 1) // LINE) as j:
            k.prefetch(soon + i * pace + j * LINE, level=2)
    for number in numbers:
        _amx(k, "tilestored64", number, places[number], width)


# Products of bfloat16 that multiply_whole_tiles makes in a step.
WHOLE_TILES = 4
WHOLE_PRODUCTS = WHOLE_TILES * SIDE * SIDE * LINE // 2


def multiply_whole_tiles(k: Emitter, steps: Value, seed: Value) -> Value:
    """The largest tiles full of `seed`, multiplied `steps` times: the sum of all products, i64."""
    memory, line = k.stack(TILE_BYTES), k.integer(LINE)
    value = rounded(k.splat(seed.cast("sitofp", f32), SIDE)) >> 16
    for row in range(SIDE):
        k.store(memory + LINE * row, value | (value << 16))
    _shape_tiles(k, k.integer(SIDE), k.integer(SIDE))
    x, w = WHOLE_TILES, WHOLE_TILES + 1
    for tile in (x, w):
        _amx(k, "tileloadd64", tile, k.pointer(memory), line)
    for tile in range(WHOLE_TILES):
        _amx(k, "tilezero", tile)
    with k.loop(steps):
        for tile in range(WHOLE_TILES):
            _amx(k, "tdpbf16ps", tile, x, w)
    total = k.constant(i64(SIDE), 0)
    for tile in range(WHOLE_TILES):
        _amx(k, "tilestored64", tile, k.pointer(memory), line)
        for row in range(SIDE):
            total = total + k.load(memory + LINE * row, f32(SIDE)).cast("fptosi", i64)
    _amx(k, "tilerelease")
    return k.sum(total)
