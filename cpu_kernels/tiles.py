"""Panels times many rows of activations with AMX: 16 x 16 sums of products in one instruction.

What a panel has of a group (see pack.py) is the right side of such a product as it is, since both
want four consecutive weights of 16 rows side by side. The left side is 16 rows of activations at
equal distances, which they are copied to. Sums go through memory to the vector unit, which scales
and adds them as gemm.py does: the same integers and the same operations in the same order, and so
the same bits.

Of a group, the vector unit has 64 instructions to do, at two in a cycle; its product takes half of
that time, and long to arrive, so it is begun four groups before.
"""

from __future__ import annotations

from llvmlite import ir

from cpu_kernels.activations import CHUNK_BYTES, FIRST_SUMS, GROUP, SCALES, SUMS
from cpu_kernels.groups import GROUPS
from cpu_kernels.isa import ISAS
from cpu_kernels.pack import CHUNKS_AT_ONCE, STEPS, group_bytes, num_scales
from cpu_kernels.simd import Emitter, Value, emitted, f32, i8, i32, i64

SIDE = 16  # rows of activations, and of weights, of a tile
LINE = 64
TILE_BYTES = SIDE * LINE
AHEAD = 4  # groups, each with a tile for its sums
ACTIVATIONS, WEIGHTS = 4, 5  # the other tiles
COPY_BYTES = CHUNKS_AT_ONCE * CHUNK_BYTES + LINE  # rows in different sets of the first-level cache


def copies_bytes(isa: str) -> int:
    """Room that copy_sources needs."""
    return SIDE * COPY_BYTES if ISAS[isa].has_tiles else 0


def _amx(k: Emitter, name: str, *arguments: Value | int) -> None:
    """Numbers are those of tiles."""
    values = [a if isinstance(a, Value) else k.constant(i8(1), a) for a in arguments]
    k.call(f"llvm.x86.{name}", ir.VoidType(), *values)


def _shape_tiles(k: Emitter, depth: int) -> None:
    """Tell this thread's core that products are sums of `depth` bytes."""
    row_bytes, rows = {ACTIVATIONS: depth}, {WEIGHTS: depth // 4}
    shapes = bytearray(LINE)
    shapes[0] = 1  # the palette
    for tile in (*range(AHEAD), ACTIVATIONS, WEIGHTS):
        shapes[16 + 2 * tile] = row_bytes.get(tile, LINE)
        shapes[48 + tile] = rows.get(tile, SIDE)
    memory = k.stack(LINE)
    k.store(memory, k.constant(i8(LINE), list(shapes)))
    _amx(k, "ldtilecfg", k.pointer(memory))


@emitted("void", "")
def begin_tiles(k, isa, format):
    """Tiles as a format wants them, for this thread; nothing, where there are none."""
    if ISAS[isa].has_tiles:
        _shape_tiles(k, GROUP // num_scales(format))


@emitted("void", "")
def end_tiles(k, isa):
    """Tiles that hold nothing need not be saved when threads take turns."""
    if ISAS[isa].has_tiles:
        _amx(k, "tilerelease")


@emitted("void", "i64 i64 i64")
def copy_sources(k, isa, sources, num_chunks, copies):
    """Where there are tiles: copy so many chunks of the rows whose addresses are at `sources`, with
    the halves of a group side by side, to `copies`, whose addresses then are at `sources`."""
    if not ISAS[isa].has_tiles:
        return
    with k.loop(k.integer(SIDE)) as row:
        source, target = k.load(sources + row * 8, i64(1)), copies + row * COPY_BYTES
        k.store(sources + row * 8, target)
        with k.loop(num_chunks) as chunk:
            at, to = source + chunk * CHUNK_BYTES, target + chunk * CHUNK_BYTES
            for four in (0, 2 * LINE):  # groups, see activations.byte_offset
                halves = [k.load(at + (four + offset), i8(LINE)) for offset in (0, LINE)]
                for two in (0, 2):
                    places = [
                        16 * group + LINE * half for group in (two, two + 1) for half in (0, 1)
                    ]
                    mask = [place + i for place in places for i in range(16)]
                    k.store(to + (four + 32 * two), k.shuffle(*halves, mask=mask))
            for offset in range(4 * LINE, CHUNK_BYTES, LINE):
                k.store(to + offset, k.load(at + offset, i8(LINE)))


def tile_product(
    k: Emitter, isa: str, format: str, panel: Value, num_chunks: Value, sources: Value
) -> list[list[Value]]:
    """Sums as gemm.multiply_panels has them, of a panel and the rows that copy_sources made."""
    parts = num_scales(format)
    first_row = k.load(sources, i64(1))
    waiting = k.stack(AHEAD * parts * TILE_BYTES)
    totals = [k.variable(k.constant(f32(SIDE), 0.0)) for _ in range(SIDE)]
    apart, line = k.integer(COPY_BYTES), k.integer(LINE)

    def group_of(four: Value, number: int) -> Value:
        return panel + (four * AHEAD + number) * group_bytes(isa, format)

    def waiting_sums(number: int, part: int) -> Value:
        return waiting + TILE_BYTES * (number * parts + part)

    def multiply(four: Value, number: int) -> None:
        weights = group_of(four, number)
        x = first_row + (four >> 1) * CHUNK_BYTES + (four & 1) * (2 * LINE) + GROUP * number
        for part in range(parts):
            at = weights + LINE * (part * STEPS // parts)
            _amx(k, "tilezero", number)
            _amx(k, "tileloadd64", ACTIVATIONS, k.pointer(x + GROUP // parts * part), apart)
            _amx(k, "tileloadd64", WEIGHTS, k.pointer(at), line)
            _amx(k, "tdpbsud", number, ACTIVATIONS, WEIGHTS)
            _amx(k, "tilestored64", number, k.pointer(waiting_sums(number, part)), line)

    def add(four: Value, number: int) -> None:
        weights = group_of(four, number) + LINE * STEPS
        position = (four & 1) * 2 + ((number >> 1) + 4 * (number & 1))  # see POSITION
        x_scales = first_row + (four >> 1) * CHUNK_BYTES + position * 4
        for part in range(parts):
            own_scale = k.load(weights + LINE * part, f32(SIDE))
            offset = k.load(weights + LINE * (parts + part), f32(SIDE))
            kind = SUMS if parts == 1 else FIRST_SUMS + 32 * part
            for row, total in enumerate(totals):
                x = x_scales + COPY_BYTES * row
                products = k.load(waiting_sums(number, part) + LINE * row, i32(SIDE))
                scale = own_scale * k.splat(k.load(x + SCALES, f32(1)), SIDE)
                value = k.multiply_add(products.cast("sitofp", f32), scale, total.get())
                x_sum = k.splat(k.load(x + kind, f32(1)), SIDE)
                total.set(k.multiply_add(offset, x_sum, value))

    last = num_chunks * (GROUPS // AHEAD) - 1
    for number in range(AHEAD):
        multiply(k.integer(0), number)
    with k.loop(last) as four:
        for number in range(AHEAD):
            add(four, number)
            multiply(four + 1, number)
    for number in range(AHEAD):
        add(last, number)
    return [[total.get()] for total in totals]


# Products of bytes that multiply_whole_tiles makes in a step.
WHOLE_PRODUCTS = AHEAD * SIDE * SIDE * LINE


def multiply_whole_tiles(k: Emitter, steps: Value, seed: Value) -> Value:
    """The largest tiles full of `seed`, multiplied `steps` times: the sum of all products, i64."""
    memory, line = k.stack(TILE_BYTES), k.integer(LINE)
    for row in range(SIDE):
        k.store(memory + LINE * row, k.splat(seed.cast("trunc", i8), LINE))
    _shape_tiles(k, LINE)
    for tile in (ACTIVATIONS, WEIGHTS):
        _amx(k, "tileloadd64", tile, k.pointer(memory), line)
    for tile in range(AHEAD):
        _amx(k, "tilezero", tile)
    with k.loop(steps):
        for tile in range(AHEAD):
            _amx(k, "tdpbsud", tile, ACTIVATIONS, WEIGHTS)
    total = k.constant(i64(SIDE), 0)
    for tile in range(AHEAD):
        _amx(k, "tilestored64", tile, k.pointer(memory), line)
        for row in range(SIDE):
            total = total + k.load(memory + LINE * row, i32(SIDE)).cast("sext", i64)
    _amx(k, "tilerelease")
    return k.sum(total)
