"""Small float32 matrix products C = A B (or C += A B), the arithmetic of attention.

Each element of C is one chain of multiply-adds in the order of the depth, whatever the shape of
the tile that computes it: the result does not depend on how rows and columns are cut.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from cpu_kernels.gemv import LINE
from cpu_kernels.isa import host_features, is_arm
from cpu_kernels.lanes import ELEMENT_BYTES, LANES, load_lanes
from cpu_kernels.memory import stack, store_word
from cpu_kernels.products import kernel
from cpu_kernels.record import fields
from cpu_kernels.simd import Emitter, Value, emitted, f32, i64


class Registers(NamedTuple):
    """What a processor's registers hold: columns of a tile come in units of `lanes`, and a tile of
    1, 2, 3 ... rows, up to the most, has so many units at most."""

    lanes: int
    most_units: tuple[int, ...]

    @property
    def most_rows(self) -> int:
        return len(self.most_units)


# Enough sums to hide how long a multiply-add takes, and what rows and columns need besides.
REGISTERS = {
    "avx2": Registers(8, (8, 4, 3, 3)),  # 16 of 8 lanes
    # 32 of 16. Many rows rather than many units: what turns units into float32 keeps multiply-adds
    # waiting, and fewer columns stay in the first-level cache until the last tile below.
    "avx512": Registers(16, (4, 4, 4, 4, 4, 4, 2, 2)),
    "neon": Registers(8, (8, 4, 3, 2)),  # 32 of 4
}

# What all tiles of a product know, as make_multiply has it.
PRODUCT = fields("a_row b b_panel depth c_row fresh")


@emitted("void", "i64 i64 i64 i64 i64 i64 i64 i64 i64 i64")
def _multiply(
    k, registers, kind, product, a, a_row, num_rows, num_panels, depth, c, c_row, next, rows
):
    """Tiles of `rows` rows below each other, the last ones of one less, column by column."""
    lanes, most_units = REGISTERS[registers]
    num_tiles = (num_rows + rows - 1) // rows
    num_smaller = rows * num_tiles - num_rows
    num_larger = num_tiles - num_smaller
    unit_bytes, num_units = lanes * ELEMENT_BYTES[kind], num_panels * (LANES // lanes)
    functions = {}

    def tile(num_rows, num_units, *values):
        if (num_rows, num_units) not in functions:
            write = _tile(registers, kind, num_rows, num_units)
            functions[num_rows, num_units] = k.function(f"tile_{num_rows}x{num_units}", write)
        functions[num_rows, num_units](product, *values)

    def column(most_rows, first_unit, units):
        pace = k.integer(units * unit_bytes) // num_tiles
        ahead, share = next + first_unit * unit_bytes * depth, pace * depth

        def tiles(count, tile_rows, first_row, first_tile):
            with k.loop(count) as i:
                row = first_row + i * tile_rows
                target = c + row * c_row + first_unit * (4 * lanes)
                fetched = ahead + (first_tile + i) * share
                tile(tile_rows, units, a + row * a_row, target, first_unit, fetched, pace)

        tiles(num_larger, most_rows, k.integer(0), k.integer(0))
        if most_rows > 2:  # what needs several tiles has larger ones
            tiles(num_smaller, most_rows - 1, num_larger * most_rows, num_larger)

    for most_rows, most in enumerate(most_units, 1):
        with k.when(rows.compare("==", most_rows)):
            for start, count, units in _columns(k, num_units, most, LANES // lanes):
                with k.loop(count) as number:
                    column(most_rows, start + number * units, units)


def _columns(
    k: Emitter, num_units: Value, most: int, in_panel: int
) -> list[tuple[Value, Value, int]]:
    """How columns of at most so many units follow each other: first unit, count, units of each."""
    if most == 3:  # rather twice two units than three and one: that has too few sums
        num_pairs = num_units * 2 - num_units * 2 // 3 * 3
        num_triples = (num_units - num_pairs * 2) // 3
        return [(k.integer(0), num_triples, 3), (num_triples * 3, num_pairs, 2)]
    count = num_units // most
    done, rest = count * most, num_units - count * most
    last = [
        (done, k.select(rest.compare("==", n), k.integer(1), k.integer(0)), n)
        for n in range(in_panel, most, in_panel)
    ]
    return [(k.integer(0), count, most), *last]


def _tile(registers: str, kind: str, num_rows: int, num_units: int) -> Callable:
    """What writes a tile, rows times units of C, all of it in registers."""
    lanes = REGISTERS[registers].lanes
    in_panel, step = LANES // lanes, LANES * ELEMENT_BYTES[kind]
    cells = [(r, u) for r in range(num_rows) for u in range(num_units)]

    def write(k, product, a, c, first_unit, next, pace):
        """What lies at `next` is prefetched, `pace` bytes further at each depth."""
        a_row, b, b_panel, depth, c_row, fresh = (
            k.load(product + 8 * field, i64(1)) for field in PRODUCT
        )
        addresses = {(r, u): c + c_row * r + 4 * lanes * u for r, u in cells}
        sums = {cell: k.variable(k.constant(f32(lanes), 0.0)) for cell in cells}
        with k.when(fresh.compare("==", 0)):
            for cell, address in addresses.items():
                sums[cell].set(k.load(address, f32(lanes), align=4))
        units = [first_unit + u for u in range(num_units)]
        columns = [
            b + unit // in_panel * b_panel + (unit & (in_panel - 1)) * (step // in_panel)
            for unit in units
        ]
        ahead = k.variable(next)
        with k.loop(depth) as d:
            values = [load_lanes(k, kind, column + d * step, lanes) for column in columns]
            for line in range(0, num_units * step // in_panel, LINE):
                k.prefetch(ahead.get() + line)
            ahead.set(ahead.get() + pace)
            for r in range(num_rows):
                factor = k.splat(k.load(a + a_row * r + d * 4, f32(1), align=4), lanes)
                for u, value in enumerate(values):
                    sums[r, u].set(k.multiply_add(factor, value, sums[r, u].get()))
        for cell, address in addresses.items():
            k.store(address, sums[cell].get(), align=4)

    return write


def make_multiply(registers: str, kind: str) -> Callable:
    """A kernel (see cpu_kernels.products) that multiplies float32 rows with a matrix whose elements
    are of `kind`."""

    most_rows = REGISTERS[registers].most_rows

    def multiply(a, a_row, num_rows, b, b_panel, num_panels, depth, c, c_row, fresh, next, _11):
        """C [num_rows, 16 * num_panels] = A [num_rows, depth] B, or C += A B if not `fresh`.

        Rows of A and C are a_row and c_row bytes apart. B lies in panels of 16 columns, [depth,
        16], which are b_panel bytes apart. As much as B has is prefetched from `next` on, each
        tile its share: misses of one tile's all at once would be too many.
        """
        product, num_tiles = stack("48"), (num_rows + most_rows - 1) // most_rows
        store_word(product, PRODUCT.a_row, a_row)
        store_word(product, PRODUCT.b, b)
        store_word(product, PRODUCT.b_panel, b_panel)
        store_word(product, PRODUCT.depth, depth)
        store_word(product, PRODUCT.c_row, c_row)
        store_word(product, PRODUCT.fresh, fresh)
        rows = (num_rows + num_tiles - 1) // num_tiles
        _multiply(
            registers, kind, product, a, a_row, num_rows, num_panels, depth, c, c_row, next, rows
        )

    return multiply


def host_registers() -> str:
    """Name of the REGISTERS of this processor."""
    from llvmlite import binding

    if host_features().get("avx512f", False):
        return "avx512"
    return "neon" if is_arm(binding.get_process_triple()) else "avx2"


def multiply_kernel(kind: str) -> int:
    """Address of the kernel for this processor, compiled if need be."""
    return kernel(make_multiply, host_registers(), kind)[0]
