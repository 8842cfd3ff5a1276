"""How groups of 32 weights lie in the blocks of each number format, as data, and their decoding.

Kernels work on a chunk of 256 weights: one block of a format with blocks of 256, two to eight of
the others. Inside a chunk, each half of a group (16 weights, `Piece`) has its low bits in 16
consecutive bytes, shifted, and perhaps high bits in 16 other bytes: that is all there is to know.
Layouts are ggml's (ggml-common.h, ggml-quants.c), and those that formats.py describes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

from cpu_kernels.activations import GROUP
from cpu_kernels.formats import FORMATS, NF4
from cpu_kernels.scales import GROUPS, scales_and_offsets
from cpu_kernels.simd import Emitter, Value, i8, i16, i32


class Piece(NamedTuple):
    """Where 16 weights are, in a chunk: byte offsets, and how far to shift right."""

    low: int
    low_shift: int
    high: int = 0
    high_shift: int = 0


class Layout(NamedTuple):
    """What a format's bytes stand for, but for its scales (see scales.py)."""

    piece: Callable[[int, int], Piece]  # of a group and half
    largest: int  # of the integers, without their sign
    offset_factor: float  # of the offsets, see Chunk
    low_bits: int = 4
    high_bits: int = 0  # that follow the low ones
    single_bits: bool = False  # a weight's high bit is one of 16 in two bytes
    num_scales: int = 1  # of a group: two where its halves differ
    table: tuple[int, ...] = ()  # what the bits stand for, where that is no number
    signed: bool = False  # the integers of the others are 0 or more

    @property
    def centre(self) -> int:
        """The integer that stands for 0, where it is the same one everywhere (offsets then are
        scales); 0: there is none, or none is needed."""
        return 0 if self.signed or self.offset_factor >= -1 else int(-self.offset_factor)


def _blocks(nbytes: int, start: int, groups: int = 1) -> Callable[[int, int], Piece]:
    """Blocks of so many groups: 16 bytes each, whose upper halves are the second half."""

    def piece(group: int, half: int) -> Piece:
        block, member = divmod(group, groups)
        return Piece(nbytes * block + start + 16 * member, 4 * half)

    return piece


def _q5(nbytes: int, high: int) -> Callable[[int, int], Piece]:
    return lambda group, half: Piece(
        nbytes * group + high + 4, 4 * half, nbytes * group + high + 2 * half
    )


def _two_bits(start: int, group: int, half: int, high: int = 0) -> Piece:
    """Four groups share 32 bytes; with them, perhaps, all eight share 32 others."""
    part, member = divmod(group, 4)
    return Piece(start + 32 * part + 16 * half, 2 * member, high + 16 * half, group)


def _q4_k(group: int, half: int) -> Piece:
    return Piece(16 + 32 * (group // 2) + 16 * half, 4 * (group % 2))


def _q5_k(group: int, half: int) -> Piece:
    return Piece(48 + 32 * (group // 2) + 16 * half, 4 * (group % 2), 16 + 16 * half, group)


def _q6_k(group: int, half: int) -> Piece:
    part, member = divmod(group, 4)
    low = 64 * part + 32 * (member % 2) + 16 * half
    return Piece(low, 4 * (member // 2), 128 + 32 * part + 16 * half, 2 * member)


# ggml-common.h's kvalues_iq4nl, and the values of E2M1 doubled, which makes them integers, plus 12,
# which makes them unsigned.
_IQ4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
_E2M1 = tuple(12 + sign * value for sign in (1, -1) for value in (0, 1, 2, 3, 4, 6, 8, 12))

LAYOUTS = {
    "q4_0": Layout(_blocks(18, 2), 15, -8.0),
    "q4_1": Layout(_blocks(20, 4), 15, 1.0),
    "q5_0": Layout(_q5(22, 2), 31, -16.0, high_bits=1, single_bits=True),
    "q5_1": Layout(_q5(24, 4), 31, 1.0, high_bits=1, single_bits=True),
    "q8_0": Layout(
        lambda group, half: Piece(34 * group + 2 + 16 * half, 0), 128, -128.0, 8, signed=True
    ),
    "iq4_nl": Layout(_blocks(18, 2), 128, -128.0, table=_IQ4, signed=True),
    "iq4_xs": Layout(_blocks(16, 8), 128, -128.0, table=_IQ4, signed=True),
    "mxfp4": Layout(_blocks(17, 1), 24, -12.0, table=_E2M1),
    "int4_g128": Layout(_blocks(68, 4, groups=4), 15, -1.0),
    "nf4": Layout(_blocks(34, 2, groups=2), 128, -128.0, table=NF4, signed=True),
    "q2_k": Layout(partial(_two_bits, 16), 3, -1.0, low_bits=2, num_scales=2),
    "q3_k": Layout(partial(_two_bits, 32), 7, -4.0, low_bits=2, high_bits=1, num_scales=2),
    "q4_k": Layout(_q4_k, 15, -1.0),
    "q5_k": Layout(_q5_k, 31, -1.0, high_bits=1),
    "q6_k": Layout(_q6_k, 63, -32.0, high_bits=2, num_scales=2),
}


def chunk_bytes(format: str) -> int:
    return 256 // FORMATS[format].block_size * FORMATS[format].block_bytes


def by_bytes(format: str) -> list[tuple[int, int]]:
    """Groups and their halves, those that share bytes one after the other."""
    piece = LAYOUTS[format].piece
    every = [(number, half) for number in range(GROUPS) for half in (0, 1)]
    return sorted(every, key=lambda at: (piece(*at).high, piece(*at).low))


class Row(NamedTuple):
    """A row of weights as a run of chunks. Where it is no whole number of them, the last one begins
    earlier, so that it ends with the row: nothing has to be copied, and what is in two chunks meets
    zeros in the last one (see activations.py)."""

    start: Value  # address
    num_chunks: Value
    last: Value  # bytes from the start to the last chunk
    nbytes: int  # of a chunk

    def chunk(self, index: Value) -> Value:
        """Address of a chunk."""
        return self.start + index.k.minimum(index * self.nbytes, self.last)


def row_of_chunks(k: Emitter, format: str, weights: Value, num_groups: Value) -> Row:
    """The row at `weights`. One that is shorter than a chunk is copied, with zeros before it."""
    nbytes = chunk_bytes(format)
    length = (num_groups * nbytes) >> 3
    start = k.variable(weights)
    if FORMATS[format].block_size < GROUPS * GROUP:
        with k.when(length.compare("<", nbytes)):
            start.set(_behind_zeros(k, weights, length, nbytes))
    last = k.maximum(length - nbytes, k.integer(0))
    return Row(start.get(), (num_groups + (GROUPS - 1)) >> 3, last, nbytes)


def _behind_zeros(k: Emitter, address: Value, length: Value, nbytes: int) -> Value:
    """Address of a copy of `length` bytes that ends where `nbytes` of room do."""
    copy = k.stack(-(-nbytes // 16) * 16)
    for offset in range(0, nbytes, 16):
        k.store(copy + offset, k.constant(i8(16), 0))
    target = copy - (length - nbytes)
    with k.loop(length) as i:
        k.store(target + i, k.load(address + i, i8(1)))
    return copy


_BYTE_SHUFFLES = {
    16: "llvm.x86.ssse3.pshuf.b.128",
    32: "llvm.x86.avx2.pshuf.b",
    64: "llvm.x86.avx512.pshuf.b.512",
}


def look_up(k: Emitter, isa: str, table: Sequence[int], codes: Value) -> Value:
    """table[code] of each i8 lane, for codes 0 to 15 and integers of 8 bits."""
    if isa == "neon_dotprod":
        values = k.constant(i8(16), table)
        return k.call("llvm.aarch64.neon.tbl1.v16i8", codes.type, values, codes)
    if isa not in ("", "portable"):
        values = k.constant(codes.type, list(table) * (codes.lanes // 16))
        return k.call(_BYTE_SHUFFLES[codes.lanes], codes.type, values, codes)
    found = k.constant(codes.type, table[0])
    for code in range(1, 16):
        found = k.select(codes.compare("==", code), k.constant(codes.type, table[code]), found)
    return found


class Chunk:
    """Decodes the chunk at an address, `groups` (1, 2 or 4) groups at a time.

    A weight is `scale * integer + offset * offset_factor`; `scales` and `offsets` are those of
    scales.py.
    `make_unsigned`: signed integers get 128 added, for instructions that want unsigned weights.
    `isa`: whose instructions may be used to look things up in a table; "": any processor's.
    """

    def __init__(
        self,
        k: Emitter,
        format: str,
        address: Value,
        groups: int,
        make_unsigned: bool = False,
        isa: str = "",
    ) -> None:
        self.k, self.address, self.groups, self.isa = k, address, groups, isa
        self.layout, self.nbytes = LAYOUTS[format], chunk_bytes(format)
        self.flip = make_unsigned and self.layout.signed
        self.is_signed = self.layout.signed and not self.flip
        self._loaded: dict[tuple[int, ...], Value] = {}
        self.scales, self.offsets = scales_and_offsets(k, format, address)
        if self.is_signed:
            self.offsets = []

    def integers(self, step: int, half: int) -> Value:
        """One half of each of this step's groups: i8 [16 * groups]."""
        layout = self.layout
        numbers = range(step * self.groups, (step + 1) * self.groups)
        pieces = [layout.piece(group, half) for group in numbers]
        value = self._bytes([p.low for p in pieces], [-p.low_shift for p in pieces])
        if layout.low_bits < 8:
            value = value & ((1 << layout.low_bits) - 1)
        if layout.table:
            value = look_up(self.k, self.isa, layout.table, value)
        if layout.single_bits:
            value = value | self._single_bits([p.high for p in pieces])
        elif layout.high_bits:  # straight to where they belong
            left = [layout.low_bits - p.high_shift for p in pieces]
            high = self._bytes([p.high for p in pieces], left)
            value = value | (high & (((1 << layout.high_bits) - 1) << layout.low_bits))
        return value ^ 0x80 if self.flip else value

    def _single_bits(self, offsets: Sequence[int]) -> Value:
        """16 bits from each offset, each to where the fifth bit of a byte is."""
        k = self.k
        words = k.gather([k.load(self.address + offset, i16(1)) for offset in offsets])
        spread = [2 * word + byte // 8 for word in range(len(offsets)) for byte in range(16)]
        bytes_ = k.shuffle(words.view(i8(2 * len(offsets))), mask=spread)
        bit = k.constant(bytes_.type, [1 << i % 8 for i in range(16)] * len(offsets))
        here = (bytes_ & bit).compare("==", bit)
        zero = k.constant(bytes_.type, 0)
        return k.select(here, k.constant(bytes_.type, 1 << self.layout.low_bits), zero)

    def _bytes(self, offsets: Sequence[int], left: Sequence[int]) -> Value:
        """16 bytes from each offset, shifted left or (negative) right; bits of neighbours enter."""
        if min(left) < 0 < max(left):
            parts = [self._bytes([o], [n]) for o, n in zip(offsets, left, strict=True)]
            return self.k.concatenate(parts)
        key = tuple(offsets)
        if key not in self._loaded:  # once, however often they are asked for
            self._loaded[key] = self._load(offsets)
        value = self._loaded[key]
        words = value.view(i32(value.lanes // 4))
        bits = [abs(n) for n in left for _ in range(4)]
        words = words << bits if max(left) > 0 else words >> bits
        return words.view(value.type) if any(bits) else value

    def _load(self, offsets: Sequence[int]) -> Value:
        """16 bytes from each offset, in few instructions: AMD's Zen puts what is not in place
        there at half the speed of loads that are, or of one for all."""
        k, count, first = self.k, len(offsets), offsets[0]
        if list(offsets) == [first + 16 * i for i in range(count)]:
            return k.load(self.address + first, i8(16 * count))
        if len(set(offsets)) == 1:
            return k.shuffle(k.load(self.address + first, i8(16)), mask=list(range(16)) * count)
        starts = [offset - 16 * i for i, offset in enumerate(offsets)]
        if min(starts) < 0 or max(starts) + 16 * count > self.nbytes or count > 2:
            return k.concatenate([k.load(self.address + o, i8(16)) for o in offsets])
        low, high = [k.load(self.address + start, i8(32)) for start in starts]
        return k.shuffle(low, high, mask=[*range(16), *range(48, 64)])
