"""Some rows of activations times quantized weights, straight from the file's bytes.

Rows of weights are multiplied `panel_rows` at a time, one in each 32-bit lane of a register: four
consecutive weights of every row, then the next four. The bytes of a group get this order while they
are still packed, are decoded once, and are multiplied with one row of activations after the other,
of which four values at a time are broadcast to all lanes. Where sums are short (see
dot.keeps_rows_whole), 16 consecutive weights stay side by side instead: to add what they give takes
no longer than to broadcast more often, and no order has to be changed.

Every result has the bits that gemv.py gives it: products are summed in integers within a group,
exactly; groups at the same place of their chunks are added up one after the other, and the sums of
the eight places in pairs at last.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import NamedTuple

from cpu_kernels.activations import CHUNK, CHUNK_BYTES, FEW_ROWS, POSITION, SCALES, byte_offset
from cpu_kernels.dot import keeps_rows_whole, multiply_bytes, row_dots, wants_unsigned
from cpu_kernels.formats import FORMATS
from cpu_kernels.gemv import PREFETCH_BYTES, prefetch_chunk
from cpu_kernels.groups import GROUPS, LAYOUTS, by_bytes, chunk_bytes, look_up
from cpu_kernels.isa import ISAS
from cpu_kernels.panel_scales import panel_scales
from cpu_kernels.simd import Emitter, Value, emitted, f32, i8, i32, i64

LANE = 4  # words of 32 bits in 128 bits, inside which shuffles are cheap


class Group(NamedTuple):
    """A group of every row of a panel, decoded."""

    number: int  # in its chunk
    integers: list[list[Value]]  # of each half: i8 [4 * rows], four times (see Panel)
    scales: list[Value]  # float32 [rows]: one, or one for each half
    offsets: list[tuple[Value, int]]  # float32 [rows], and the activations' sums they belong to


class Panel:
    """The same chunk of some rows of weights. See groups.Chunk for what the numbers mean.

    A register of weights has four consecutive ones of every row; with `whole_rows`, 16 consecutive
    ones of every fourth row.
    """

    def __init__(
        self, k: Emitter, isa: str, format: str, addresses: list[Value], whole_rows: bool = False
    ) -> None:
        self.whole_rows = whole_rows
        self.k, self.isa, self.layout, self.addresses = k, isa, LAYOUTS[format], addresses
        self.rows, self.nbytes = len(addresses), chunk_bytes(format)
        self.block_bytes = FORMATS[format].block_bytes
        self.is_block = FORMATS[format].block_size == CHUNK  # so that no group is ever skipped
        self.flip = wants_unsigned(isa) and self.layout.signed
        self.is_signed = self.layout.signed and not self.flip
        self._loaded: dict[int, list[Value]] = {}  # side by side
        self._scales = panel_scales(k, format, self.words)

    def group(self, number: int) -> Group:
        """Written anew each time if some may be skipped: they would leave nothing behind."""
        if not self.is_block:
            self._loaded.clear()
        integers = [self.integers(number, half) for half in (0, 1)]
        return Group(number, integers, *self.scales(number))

    def scales(self, number: int) -> tuple[list[Value], list[tuple[Value, int]]]:
        """Scales and offsets of a group."""
        scales, offsets = self._scales(number)
        return scales, [] if self.is_signed else offsets

    def integers(self, group: int, half: int) -> list[Value]:
        """Half a group: four i8 [4 * rows], each with four consecutive weights of every row."""
        layout, decoded = self.layout, []
        piece = layout.piece(group, half)
        bytes_at = self._rows if self.whole_rows else self._bytes
        for word, low in enumerate(bytes_at(piece.low)):
            value = _shifted(low, -piece.low_shift)
            if layout.low_bits < 8:
                value = value & ((1 << layout.low_bits) - 1)
            if layout.table:
                value = look_up(self.k, self.isa, layout.table, value)
            if layout.single_bits:
                value = value | self._single_bits(piece.high, word)
            elif layout.high_bits:  # straight to where they belong
                high = _shifted(bytes_at(piece.high)[word], layout.low_bits - piece.high_shift)
                value = value | (high & (((1 << layout.high_bits) - 1) << layout.low_bits))
            decoded.append(value ^ 0x80 if self.flip else value)
        return decoded

    def _bytes(self, offset: int) -> list[Value]:
        return [word.view(i8(4 * self.rows)) for word in self.words(offset)]

    def words(self, offset: int) -> list[Value]:
        """16 bytes of every row, as four words of every row."""
        return self.k.transpose([own.view(i32(self.rows)) for own in self._rows(offset)])

    def _rows(self, offset: int) -> list[Value]:
        """The same, as the 16 bytes of every fourth row, four times."""
        if offset not in self._loaded:  # once, however often they are asked for
            rows = [self.addresses[first::LANE] for first in range(LANE)]
            self._loaded[offset] = [self._side_by_side(own, offset) for own in rows]
        return self._loaded[offset]

    def _side_by_side(self, addresses: list[Value], offset: int) -> Value:
        """16 bytes from each address. Two of them as halves of registers that have them in place,
        where that is within the chunk: AMD's Zen takes longer to put them there."""
        k, nbytes = self.k, 4 * LANE
        if len(addresses) == 2 and nbytes <= offset <= self.nbytes - 2 * nbytes:
            places = addresses[0] + offset, addresses[1] + (offset - nbytes)
            low, high = [k.load(place, i8(2 * nbytes)) for place in places]
            both = k.shuffle(low, high, [*range(nbytes), *range(3 * nbytes, 4 * nbytes)])
        else:
            both = k.concatenate([k.load(place + offset, i8(nbytes)) for place in addresses])
        return both

    def _single_bits(self, offset: int, word: int) -> Value:
        """Four of the 16 bits at `offset`, of every row, each to the place of a fifth bit."""
        k = self.k
        start = offset // self.block_bytes * self.block_bytes  # of which the scales are read, too
        index, byte = divmod(offset - start + word // 2, 4)
        bytes_ = self.words(start)[index].view(i8(4 * self.rows))
        spread = [4 * row + byte for row in range(self.rows) for _ in range(4)]
        bit = k.constant(bytes_.type, [1 << (4 * word + i) % 8 for i in range(4)] * self.rows)
        here = (k.shuffle(bytes_, mask=spread) & bit).compare("==", bit)
        zero = k.constant(bytes_.type, 0)
        return k.select(here, k.constant(bytes_.type, 1 << self.layout.low_bits), zero)

    def multiply(self, group: Group, x: Value, before: Value, sums: Value) -> None:
        """Sums of a row of activations, by position float32 [rows] of products, then of offsets:
        those at `sums` are those `before`, and the products of a group with that of a prepared row,
        whose chunk is at `x`."""
        k, rows, position = self.k, self.rows, POSITION[group.number]
        place = 8 * rows * position
        products = k.load(before + place, f32(rows))
        x_scale = self._everywhere(x + (SCALES + 4 * position))
        for part, scale in enumerate(group.scales):
            dots = self._row_dots(group, x) if self.whole_rows else self._dots(group, x, part)
            products = k.multiply_add(dots.cast("sitofp", f32), scale * x_scale, products)
        k.store(sums + place, products)
        place += 4 * rows
        if group.offsets:
            total = k.load(before + place, f32(rows))
            for offset, kind in group.offsets:
                x_sum = self._everywhere(x + (kind + 4 * position))
                total = k.multiply_add(offset, x_sum, total)
            k.store(sums + place, total)

    def _dots(self, group: Group, x: Value, part: int) -> Value:
        """Dot products of the integers that belong to one of the group's scales: i32 [rows]."""
        halves = (0, 1) if len(group.scales) == 1 else (part,)
        pairs = []
        for half in halves:
            for word, weights in enumerate(group.integers[half]):
                at = x + (byte_offset(group.number, half) + 4 * word)
                pairs.append((weights, self._everywhere(at).view(weights.type)))
        return multiply_bytes(self.k, self.isa, pairs, self.layout.largest, self.is_signed)

    def _row_dots(self, group: Group, x: Value) -> Value:
        k = self.k
        values = [k.load(x + byte_offset(group.number, half), i8(4 * LANE)) for half in (0, 1)]
        xs = [k.concatenate([value] * (self.rows // LANE)) for value in values]
        halves = zip(*group.integers, strict=True)
        return row_dots(k, [list(zip(weights, xs, strict=True)) for weights in halves])

    def _everywhere(self, address: Value) -> Value:
        return self.k.splat(self.k.load(address, f32(1)), self.rows)


def _shifted(value: Value, left: int) -> Value:
    """Bytes, shifted left or (negative) right; bits of neighbours enter."""
    words = value.view(i32(value.lanes // 4))
    words = words << left if left > 0 else words >> -left
    return words.view(value.type) if left else value


def _total(k: Emitter, sums: Value, rows: int, offset_factor: float) -> Value:
    totals, factor = [], k.constant(f32(rows), offset_factor)
    for position in range(GROUPS):
        place = sums + 8 * rows * position
        products = k.load(place, f32(rows))
        if offset_factor:
            products = k.multiply_add(k.load(place + 4 * rows, f32(rows)), factor, products)
        totals.append(products)
    while len(totals) > 1:
        half = len(totals) // 2
        totals = [a + b for a, b in zip(totals[:half], totals[half:], strict=True)]
    return totals[0]


def _further_on(k: Emitter, start: Value, nbytes: int, row_bytes: Value, num_rows: int) -> Value:
    """Where in each of a panel's rows lies what is wanted soon: a chunk further on, or the next
    panel's, where a row ends before."""
    ahead = start + k.minimum(k.integer(PREFETCH_BYTES // num_rows), row_bytes)
    is_within = (ahead + nbytes).compare("<=", row_bytes)
    return ahead + k.select(is_within, k.integer(0), row_bytes * (num_rows - 1))


def _places(
    k: Emitter, first: Value, row_bytes: Value, three_rows: Value, num_rows: int
) -> list[Value]:
    """The same place in each row, from that in the first one. Every fourth is in a register and the
    others at a distance from it that is in one: one for each would be too many."""
    fours = [k.opaque(first + row_bytes * row) for row in range(0, num_rows, LANE)]
    apart = k.integer(0), row_bytes, row_bytes * 2, three_rows
    return [four + distance for four in fours for distance in apart]


@emitted("void", "i64 i64 i64 i64 i64 i64 i64 i64")
def multiply_few(
    k, isa, format, weights, row_bytes, num_groups, sources, num_rows, added, targets, offset
):
    """`panel_rows` rows of weights, `row_bytes` apart and of at least eight groups, times up to
    FEW_ROWS prepared rows, whose addresses are at `sources`. The results for each, with the float32
    [panel_rows] at `added`, go `offset` bytes after its address at `targets`."""
    rows, nbytes = ISAS[isa].panel_rows, chunk_bytes(format)
    row_sums = 8 * rows * GROUPS
    sums, zeros = k.stack(FEW_ROWS * row_sums), k.stack(row_sums)
    for place in range(0, row_sums, 4 * rows):
        k.store(zeros + place, k.constant(f32(rows), 0.0))
    three_rows = k.opaque(row_bytes * 3)
    with k.loop((num_groups + (GROUPS - 1)) >> 3) as i:
        at = k.minimum(i * nbytes, row_bytes - nbytes)  # see groups.Row
        soon = weights + _further_on(k, at, nbytes, row_bytes, rows)
        places = _places(k, weights + at, row_bytes, three_rows, rows)
        panel = Panel(k, isa, format, places, keeps_rows_whole(isa, format))
        first = k.maximum((i + 1) * GROUPS - num_groups, k.integer(0))  # that is not zeros
        begins = i.compare("==", 0)
        before = k.select(begins, zeros, sums)
        before_bytes = k.select(begins, k.integer(0), k.integer(row_sums))
        numbers = [number for number, half in by_bytes(format) if half == 0]
        for turn, number in enumerate(numbers):
            # A few lines at a time: a core that asks for more than some twenty has to wait.
            for _ in range(turn * rows // GROUPS, (turn + 1) * rows // GROUPS):
                prefetch_chunk(k, soon, nbytes)
                soon = k.opaque(soon + row_bytes)
            with nullcontext() if panel.is_block else k.when(first.compare("<=", number)):
                group = panel.group(number)
                with k.loop(num_rows) as row:
                    x = k.load(sources + row * 8, i64(1)) + i * CHUNK_BYTES
                    panel.multiply(group, x, before + row * before_bytes, sums + row * row_sums)
        is_signed = panel.is_signed
    offset_factor = 0.0 if is_signed else LAYOUTS[format].offset_factor
    with k.loop(num_rows) as row:
        total = _total(k, sums + row * row_sums, rows, offset_factor)
        target = k.load(targets + row * 8, i64(1))
        k.store(target + offset, total + k.load(added, f32(rows)))
