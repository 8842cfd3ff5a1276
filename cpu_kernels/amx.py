"""Many rows of activations times quantized weights with AMX: 16 x 16 sums of products of bfloat16.

Weights are decoded to bfloat16, scales and all, once for all rows of activations, which are rounded
to the same: an error of 2^-9 of each, where that of int8 activations is about 2^-8 of the largest
in a group. Products are added in float32 inside the tiles, along the whole row. With integers, each
group's sums would have to be scaled and added by the vector units, which takes several times as
long as the products.

A tile is 16 lines of 64 bytes. One of activations (see activations.py) has 32 values of 16 rows;
one of weights has, in each line, two consecutive ones of 16 rows side by side, so that a product
takes the 32 weights of a group. Each sum is one chain along its row, whatever else is in the tiles.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain

from llvmlite import ir

from cpu_kernels.activations import ROWS_OF_TILES, SUMS
from cpu_kernels.bfloat16 import in_pairs, plain_nan, rounded
from cpu_kernels.few_rows import Panel
from cpu_kernels.groups import GROUPS, LAYOUTS, by_bytes, row_of_chunks
from cpu_kernels.simd import Emitter, Value, emitted, f32, i8, i32, i64

SIDE = 16  # rows of activations, and of weights, of a tile
LINE = 64
TILE_BYTES = SIDE * LINE
TOKENS = ROWS_OF_TILES
ROWS = 2 * SIDE  # of weights that are multiplied at once
PANEL_BYTES = GROUPS * TILE_BYTES  # of a chunk of SIDE rows of weights
SUM_BYTES = 4 * TILE_BYTES  # of TOKENS x ROWS
_PERMUTE = "llvm.x86.avx512.permvar.sf.512"


def _amx(k: Emitter, name: str, *arguments: Value | int) -> None:
    """Numbers are those of tiles."""
    values = [a if isinstance(a, Value) else k.constant(i8(1), a) for a in arguments]
    k.call(f"llvm.x86.{name}", ir.VoidType(), *values)


def _shape_tiles(k: Emitter) -> None:
    """Tell this thread's core that all eight tiles are whole."""
    shapes = bytearray(LINE)
    shapes[0] = 1  # the palette
    for tile in range(8):
        shapes[16 + 2 * tile] = LINE
        shapes[48 + tile] = SIDE
    memory = k.stack(LINE)
    k.store(memory, k.constant(i8(LINE), list(shapes)))
    _amx(k, "ldtilecfg", k.pointer(memory))


@emitted("void", "")
def begin_tiles(k):
    """Tiles for this thread."""
    _shape_tiles(k)


@emitted("void", "")
def end_tiles(k):
    """Tiles that hold nothing need not be saved when threads take turns."""
    _amx(k, "tilerelease")


@emitted("void", "i64 i64 i64")
def copy_lines(k, source, target, count):
    """`count` times LINE bytes."""
    with k.loop(count) as line:
        k.store(target + line * LINE, k.load(source + line * LINE, i8(LINE)))


@emitted("void", "i64")
def clear_row(k, address):
    """ROWS zeros."""
    for offset in range(0, 4 * ROWS, LINE):
        k.store(address + offset, k.constant(f32(SIDE), 0.0))


class _Product:
    """Sums [TOKENS, ROWS] in four tiles, and a chunk that is added to them group by group: of rows
    of activations, from `x` on and `x_bytes` apart, and of two panels."""

    def __init__(self, k: Emitter, panels: Value, x: Value, x_bytes: Value, sums: Value) -> None:
        self.k, self.panels, self.x, self.x_bytes = k, panels, x, x_bytes
        self.places = [(t, p, sums + LINE * (ROWS * t + p)) for t in (0, 1) for p in (0, 1)]
        for t, p, place in self.places:
            _amx(k, "tileloadd64", 2 * t + p, k.pointer(place), k.integer(2 * LINE))

    def add(self, group: Value) -> Iterator[None]:
        """Eight instructions, each written when the iterator is asked for the next."""
        for t, p in ((0, 0), (0, 1), (1, 0), (1, 1)):
            if p == 0:
                yield self._load(
                    4 + t, self.x + group * LINE + self.x_bytes * (SIDE * t), self.x_bytes
                )
            if t == 0:
                at = self.panels + group * TILE_BYTES + PANEL_BYTES * p
                yield self._load(6 + p, at, self.k.integer(LINE))
            yield _amx(self.k, "tdpbf16ps", 2 * t + p, 4 + t, 6 + p)

    def _load(self, tile: int, address: Value, apart: Value) -> None:
        _amx(self.k, "tileloadd64", tile, self.k.pointer(address), apart)

    def store(self) -> None:
        for t, p, place in self.places:
            _amx(self.k, "tilestored64", 2 * t + p, self.k.pointer(place), self.k.integer(2 * LINE))


@emitted("void", "i64 i64 i64 i64 i64 i64")
def multiply_groups(k, panels, x, x_bytes, sums, first, count):
    """sums (float32 [TOKENS, ROWS]) += TOKENS rows of activations, `x_bytes` apart, times two
    panels: so many groups of a chunk, from number `first`."""
    product = _Product(k, panels, x, x_bytes, sums)
    with k.loop(count) as i:
        for _ in product.add(first + i):
            pass
    product.store()


@emitted("void", "i64 i64 i64 i64 i64 i64 i64 i64 i64 i64 i64")
def multiply_and_pack(
    k, isa, format, panels, x, x_bytes, sums, first, weights, row_bytes, last, num_groups, chunk,
    panel,
):  # fmt: skip
    """The same with half the groups, while the vector units, which have nothing to do for it,
    decode chunk number `chunk` of 16 rows of weights, which begin at `weights` and are `row_bytes`
    apart, into another `panel`. The row at `last` comes again where there are none left.

    Instructions of both kinds take turns one by one: the core has few spare tiles, and what comes
    after the next one to be loaded has to wait until there is one.
    """
    product = _Product(k, panels, x, x_bytes, sums)
    steps = chain.from_iterable(product.add(first + i) for i in range(GROUPS // 2))
    starts = [k.minimum(weights + row_bytes * row, last) for row in range(SIDE)]
    places = [row_of_chunks(k, format, start, num_groups).chunk(chunk) for start in starts]
    decoded = Panel(k, isa, format, places)
    factors = [_factors(k, format, *decoded.scales(number)) for number in range(GROUPS)]
    for index, (number, half) in enumerate(by_bytes(format)):
        tile = panel + (TILE_BYTES * number + TILE_BYTES // 2 * half)
        for step, values in enumerate(_values(k, decoded, number, half)):
            scaled = [_scaled(k, value, *factors[number][half]) for value in values]
            for place in (0, 1):
                pairs = in_pairs(k, *scaled[2 * place : 2 * place + 2])
                k.store(tile + LINE * (2 * step + place), pairs)
            if step % 2:
                next(steps)
        for line in range(0, decoded.nbytes, LINE):  # the next rows'
            k.prefetch(places[index] + row_bytes * ROWS + line)
    product.store()


def _values(k: Emitter, panel: Panel, number: int, half: int) -> list[list[Value]]:
    """Integers of half a group of 16 rows, as float32 [16]: four consecutive ones, four times."""
    layout = panel.layout
    if layout.low_bits == 4 and not layout.high_bits:  # straight from a table in a register
        table = k.constant(f32(SIDE), [float(v) for v in layout.table or range(SIDE)])
        piece = layout.piece(number, half)
        words = [word >> piece.low_shift for word in panel.words(piece.low)]
        return [
            [k.call(_PERMUTE, f32(SIDE), table, word >> (8 * i)) for i in range(4)]
            for word in words
        ]
    words = [register.view(i32(SIDE)) for register in panel.integers(number, half)]
    return [[((w >> (8 * i)) & 0xFF).cast("sitofp", f32) for i in range(4)] for w in words]


def _scaled(k: Emitter, value: Value, scale: Value, offset: Value | None) -> Value:
    return value * scale if offset is None else k.multiply_add(value, scale, offset)


def _factors(
    k: Emitter, format: str, scales: list[Value], offsets: list[tuple[Value, int]]
) -> list[tuple[Value, Value | None]]:
    """What integers of the first and of the second half are multiplied with, and what is added."""
    factor = LAYOUTS[format].offset_factor
    if LAYOUTS[format].table and LAYOUTS[format].signed:  # values come from the table, see _values
        offsets = []
    halves: list[tuple[Value, Value | None]] = []
    for half in (0, 1):
        scale = plain_nan(k, scales[half % len(scales)])
        own = [value for value, sums in offsets if sums == SUMS]
        if not own and offsets:
            own = [offsets[half][0]]
        halves.append((scale, plain_nan(k, own[0]) * factor if own else None))
    return halves


# Products of bfloat16 that multiply_whole_tiles makes in a step.
WHOLE_TILES = 4
WHOLE_PRODUCTS = WHOLE_TILES * SIDE * SIDE * LINE // 2


def multiply_whole_tiles(k: Emitter, steps: Value, seed: Value) -> Value:
    """The largest tiles full of `seed`, multiplied `steps` times: the sum of all products, i64."""
    memory, line = k.stack(TILE_BYTES), k.integer(LINE)
    value = rounded(k.splat(seed.cast("sitofp", f32), SIDE)).view(i32(SIDE)) >> 16
    for row in range(SIDE):
        k.store(memory + LINE * row, value | (value << 16))
    _shape_tiles(k)
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
