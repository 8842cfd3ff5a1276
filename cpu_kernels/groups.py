"""How groups of 32 weights lie in the blocks of each number format, as data, and their decoding.

Kernels work on a chunk of 256 weights: one block of a K format, eight blocks of the others. Inside
a chunk, each half of a group (16 weights, `piece`) has its low bits in 16 consecutive bytes,
shifted by 0 or 4, and perhaps high bits in 16 other bytes: that is all there is to know.
Layouts are ggml's (ggml-common.h, ggml-quants.c).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from cpu_kernels.activations import FIRST_SUMS, POSITION, SECOND_SUMS, SUMS
from cpu_kernels.formats import FORMATS
from cpu_kernels.simd import Emitter, Value, f16, f32, i8, i16, i32, i64

GROUPS = 8  # in a chunk


class Piece(NamedTuple):
    """Where 16 weights are, in a chunk: byte offsets, and how far to shift right."""

    low: int
    low_shift: int
    high: int = 0
    high_shift: int = 0


def chunk_bytes(format: str) -> int:
    return 256 // FORMATS[format].block_size * FORMATS[format].block_bytes


def piece(format: str, group: int, half: int) -> Piece:
    match format:
        case "q4_0" | "iq4_nl":
            return Piece(18 * group + 2, 4 * half)
        case "q4_1":
            return Piece(20 * group + 4, 4 * half)
        case "mxfp4":
            return Piece(17 * group + 1, 4 * half)
        case "q8_0":
            return Piece(34 * group + 2 + 16 * half, 0)
        case "q4_k":
            return Piece(16 + 32 * (group // 2) + 16 * half, 4 * (group % 2))
        case "q5_k":
            return Piece(48 + 32 * (group // 2) + 16 * half, 4 * (group % 2), 16 + 16 * half, group)
        case "q6_k":
            part, group = divmod(group, 4)
            low = 64 * part + 32 * (group % 2) + 16 * half
            return Piece(low, 4 * (group // 2), 128 + 32 * part + 16 * half, 2 * group)
    raise ValueError(f"no kernel knows the number format {format!r}")


# What four bits stand for where that is no number: ggml-common.h's kvalues_iq4nl, and the values of
# E2M1 doubled, which makes them integers, plus 12, which makes them unsigned.
TABLES = {
    "iq4_nl": (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113),
    "mxfp4": tuple(12 + sign * value for sign in (1, -1) for value in (0, 1, 2, 3, 4, 6, 8, 12)),
}
SIGNED = "q8_0", "iq4_nl"  # the integers of the others are 0 or more
HIGH_MASK = {"q5_k": 1, "q6_k": 3}
LARGEST = {
    "q4_0": 15,
    "q4_1": 15,
    "q4_k": 15,
    "q5_k": 31,
    "q6_k": 63,
    "q8_0": 128,
    "iq4_nl": 128,
    "mxfp4": 24,
}
QUANTIZED = tuple(LARGEST)


def is_whole(format: str) -> bool:
    """A block is a chunk, so that no row ends within one."""
    return FORMATS[format].block_size == 256


def with_padded_chunk(k: Emitter, format: str, address: Value, num_groups: Value) -> Value:
    """Address of a chunk of `num_groups` blocks from `address` and zeros after them."""
    nbytes = chunk_bytes(format)
    padded = k.stack(-(-nbytes // 16) * 16)
    for offset in range(0, nbytes, 16):
        k.store(padded + offset, k.constant(i8(16), 0))
    block_bytes = nbytes // GROUPS
    unit = i8(1) if block_bytes % 2 else i16(1)
    size = 1 + (block_bytes % 2 == 0)
    with k.loop(num_groups * (block_bytes // size)) as i:
        k.store(padded + i * size, k.load(address + i * size, unit))
    return padded


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


OFFSET_FACTOR = {
    "q4_0": -8.0, "q4_1": 1.0, "q4_k": -1.0, "q5_k": -1.0, "q6_k": -32.0, "q8_0": -128.0,
    "iq4_nl": -128.0, "mxfp4": -12.0
}  # fmt: skip


class Chunk:
    """Decodes the chunk at an address, `groups` (1, 2 or 4) groups at a time.

    A weight is `scale * integer + offset`. `scales` has float32 vectors of the eight groups (in
    the order of POSITION): one, or two where the halves of a group differ. `offsets` pairs such
    vectors, all to be multiplied with `offset_factor`, with the kind of activation sums (see
    activations.py) that they belong to.
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
        self.k, self.format, self.address, self.groups = k, format, address, groups
        self.isa = isa
        self.flip = make_unsigned and format in SIGNED
        self.is_signed = format in SIGNED and not self.flip
        self._loaded: dict[tuple[int, ...], Value] = {}
        self.offset_factor = OFFSET_FACTOR[format]
        self.scales, self.offsets = self._scales()

    def integers(self, step: int, half: int) -> Value:
        """One half of each of this step's groups: i8 [16 * groups]."""
        numbers = range(step * self.groups, (step + 1) * self.groups)
        pieces = [piece(self.format, group, half) for group in numbers]
        low = self._bytes([p.low for p in pieces], [-p.low_shift for p in pieces])
        if self.format == "q8_0":
            return low ^ 0x80 if self.flip else low
        low = low & 15
        if self.format in TABLES:
            low = look_up(self.k, self.isa, TABLES[self.format], low)
            return low ^ 0x80 if self.flip else low
        if self.format not in HIGH_MASK:
            return low
        # Straight to where the high bits belong.
        high = self._bytes([p.high for p in pieces], [4 - p.high_shift for p in pieces])
        return low | (high & (HIGH_MASK[self.format] << 4))

    def _bytes(self, offsets: Sequence[int], left: Sequence[int]) -> Value:
        """16 bytes from each offset, shifted left or (negative) right; bits of neighbours enter.

        Pieces with different shifts are shifted one by one, and then put together: shifting lanes
        by different amounts takes AMD's Zen four times as long.
        """
        key = tuple(offsets)
        if len(set(left)) > 1:
            return self.k.concatenate(
                [self._bytes([o], [n]) for o, n in zip(offsets, left, strict=True)]
            )
        if key not in self._loaded:  # once, however often they are asked for
            k, first = self.k, self.address + offsets[0]
            if list(offsets) == [offsets[0] + 16 * i for i in range(len(offsets))]:
                value = k.load(first, i8(16 * len(offsets)))
            else:
                value = k.concatenate([k.load(self.address + o, i8(16)) for o in offsets])
            self._loaded[key] = value
        value = self._loaded[key]
        words = value.view(i32(value.lanes // 4))
        words = words << left[0] if left[0] > 0 else words >> -left[0]
        return words.view(value.type) if left[0] else value

    def _scales(self) -> tuple[list[Value], list[tuple[Value, int]]]:
        k, p = self.k, self.address
        if self.format == "mxfp4":
            scale = self._powers_of_two()
            return [scale], [(scale, SUMS)]
        if self.format in ("q4_0", "q8_0", "iq4_nl"):
            scale = self._halves(0)
            if self.format == "q4_0":
                return [scale], [(scale, SUMS)]
            return [scale], [(scale, SUMS)] if self.flip else []
        if self.format == "q4_1":
            return [self._halves(0)], [(self._halves(2), SUMS)]
        if self.format in ("q4_k", "q5_k"):
            return self._six_bit_scales()
        # q6_k: a signed byte for each half of a group, and one factor
        factor = k.splat(k.load(p + 208, f16(1)).cast("fpext", f32), 8)
        bytes_ = k.load(p + 192, i8(16))
        order = [POSITION.index(i) for i in range(8)]
        scales = []
        for half in (0, 1):
            part = k.shuffle(bytes_, mask=[2 * group + half for group in order])
            scales.append(part.cast("sext", i32).cast("sitofp", f32) * factor)
        return scales, [(scales[0], FIRST_SUMS), (scales[1], SECOND_SUMS)]

    def _halves(self, offset: int) -> Value:
        """The float16 at `offset` of each of eight blocks, as float32."""
        block_bytes = FORMATS[self.format].block_bytes
        order = [POSITION.index(i) for i in range(8)]
        halves = []
        # Put together in general registers: the vector units are what a GEMV waits for.
        for four in (order[:4], order[4:]):
            word = None
            for index, group in enumerate(four):
                bits = self.k.load(self.address + (block_bytes * group + offset), i16(1))
                bits = bits.cast("zext", i64) << (16 * index)
                word = bits if word is None else word | bits
            halves.append(word)
        return self.k.gather(halves).view(f16(8)).cast("fpext", f32)

    def _powers_of_two(self) -> Value:
        """mxfp4's scales: half (see TABLES) of 2^(byte - 127), as bits of a float32."""
        word = None
        for position in range(GROUPS):
            byte = self.k.load(self.address + 17 * POSITION.index(position), i8(1))
            byte = byte.cast("zext", i64) << (8 * position)
            word = byte if word is None else word | byte
        exponent = word.view(i8(GROUPS)).cast("zext", i32)
        tiny = (exponent + 1) * (1 << 21)  # below the normal numbers
        normal = (exponent - 1) << 23
        return self.k.select(exponent.compare("<", 2), tiny, normal).view(f32(GROUPS))

    def _six_bit_scales(self) -> tuple[list[Value], list[tuple[Value, int]]]:
        """q4_k and q5_k: two factors, then eight scales and eight minima of 6 bits in 12 bytes."""
        k, p = self.k, self.address
        a, b, c = [k.load(p + (4 + 4 * i), i32(1)) for i in range(3)]
        scales = a & 0x3F3F3F3F, (c & 0x0F0F0F0F) | ((a >> 2) & 0x30303030)
        minima = b & 0x3F3F3F3F, ((c >> 4) & 0x0F0F0F0F) | ((b >> 2) & 0x30303030)
        order = [POSITION.index(i) for i in range(8)]
        values = []
        for offset, words in ((0, scales), (2, minima)):
            factor = k.load(p + offset, f16(1)).cast("fpext", f32)
            bytes_ = k.shuffle(k.gather(words).view(i8(8)), mask=order)
            values.append(bytes_.cast("zext", i32).cast("sitofp", f32) * k.splat(factor, 8))
        return [values[0]], [(values[1], SUMS)]
