"""A row of quantized weights as bfloat16, a group of 32 in each register of AVX-512.

A register has 16 words of two weights: one of the group's first half, and the one at the same place
of its second half. That is how tiles want those that are multiplied together (see amx.py).

Sixteen or thirty-two values are all that four or five bits can stand for. So they are what is
scaled and rounded, in one register for all of a group's weights, each of which is then looked up by
its bits. Weights with more bits, or with two scales in a group, are scaled and rounded themselves.
"""

from __future__ import annotations

from cpu_kernels.activations import POSITION, SUMS
from cpu_kernels.bfloat16 import in_pairs, plain_nan
from cpu_kernels.groups import GROUPS, LAYOUTS, Chunk
from cpu_kernels.scales import scales_and_offsets
from cpu_kernels.simd import Emitter, Value, f32, i8, i16, i32

HALF = 16  # weights
FACTORS_BYTES = 4 * 4 * GROUPS  # of a chunk: float32 [4, 8], scales and offsets of both halves
_PERMUTE = "llvm.x86.avx512.permvar.hi.512"


def store_factors(k: Emitter, format: str, address: Value, target: Value) -> None:
    """What the integers of the chunk at `address` are multiplied with, and what is then added."""
    layout = LAYOUTS[format]
    scales, offsets = scales_and_offsets(k, format, address)
    for half, scale in enumerate(scales):
        k.store(target + 4 * GROUPS * half, plain_nan(k, scale))
    if not _is_centred(format):
        for half in range(layout.num_scales):
            own = [v for v, sums in offsets if sums == SUMS] or [offsets[half][0]]
            offset = plain_nan(k, own[0]) * layout.offset_factor
            k.store(target + 4 * GROUPS * (2 + half), offset)


def rounded_groups(
    k: Emitter, isa: str, format: str, address: Value, factors: Value
) -> list[Value]:
    """The chunk's eight groups, one after the other: i16 [32]. `factors` have been stored."""
    layout = LAYOUTS[format]
    if layout.low_bits == 4 and layout.num_scales == 1:
        return [_looked_up(k, format, address, factors, group) for group in range(GROUPS)]
    chunk = Chunk(k, format, address, 4, isa=isa)
    integers = [[chunk.integers(step, half) for half in (0, 1)] for step in range(GROUPS // 4)]
    return [_computed(k, format, integers[group // 4], factors, group) for group in range(GROUPS)]


def _is_centred(format: str) -> bool:
    """Whether weights are multiples of their scales: nothing is added then."""
    layout = LAYOUTS[format]
    return layout.signed or layout.centre != 0


def _scaled(k: Emitter, format: str, factors: Value, group: int, half: int, values: Value) -> Value:
    """float32 [16] of what integers stand for, less what stands for 0."""
    place = 4 * POSITION[group]

    def factor(number: int) -> Value:
        return k.splat(k.load(factors + (4 * GROUPS * number + place), f32(1)), HALF)

    half %= LAYOUTS[format].num_scales
    if _is_centred(format):
        return values * factor(half)
    return k.multiply_add(values, factor(half), factor(2 + half))


def _looked_up(k: Emitter, format: str, address: Value, factors: Value, group: int) -> Value:
    layout = LAYOUTS[format]
    codes = range(32 if layout.high_bits else 16)
    integers = layout.table or codes
    values = [float(integers[code] - layout.centre) for code in codes]
    known = [
        _scaled(k, format, factors, group, 0, k.constant(f32(16), part))
        for part in (values[:16], values[-16:])
    ]
    # Of what stands for one code, or for that without and with the fifth bit, side by side: the
    # lowest bit of an index says which.
    table = in_pairs(*known).view(i16(32))
    pieces = [layout.piece(group, half) for half in (0, 1)]
    index = _spread(k, address, [p.low for p in pieces], [p.low_shift for p in pieces])
    if layout.high_bits:
        if layout.single_bits:  # 32 of them: those of word i are i and 16 + i
            word = k.splat(k.load(address + pieces[0].high, i32(1)), HALF)
            high = (word >> list(range(HALF))).view(i16(32))
        else:
            high = _spread(k, address, [p.high for p in pieces], [p.high_shift + 1 for p in pieces])
        index = (index & -2) | (high & 1)
    return k.call(_PERMUTE, i16(32), table, index)


def _spread(k: Emitter, address: Value, offsets: list[int], shifts: list[int]) -> Value:
    """Bytes of both halves side by side in 16 bits each, shifted so that what was right of `shifts`
    is gone but for one bit; others stay above: i16 [32]."""
    first, second = [k.load(address + offset, i8(HALF)) for offset in offsets]
    bytes_ = k.concatenate([first, second])
    mask = [place for i in range(HALF) for place in (i, i, HALF + i, HALF + i)]
    words = k.shuffle(bytes_, mask=mask).view(i16(32))
    return words >> [7 + shift for _ in range(HALF) for shift in shifts]


def _computed(k: Emitter, format: str, integers: list[Value], factors: Value, group: int) -> Value:
    """`integers`: of each half of four groups, i8 [64]."""
    layout, place, halves = LAYOUTS[format], HALF * (group % 4), []
    for half in (0, 1):
        own = k.shuffle(integers[half], mask=range(place, place + HALF))
        words = own.cast("sext" if layout.signed else "zext", i32)
        values = (words - layout.centre if layout.centre else words).cast("sitofp", f32)
        halves.append(_scaled(k, format, factors, group, half, values))
    return in_pairs(*halves).view(i16(32))
