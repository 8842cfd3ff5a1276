"""The scales of a chunk's eight groups, and what is added to its integers, for each number format.

Each function returns a chunk's `scales`: float32 vectors of the eight groups, in the order of
POSITION; two of them where the halves of a group differ; and its `offsets`: such vectors, each with
the kind of activation sums (see activations.py) that it belongs to.
Layouts are ggml's (ggml-common.h, ggml-quants.c), and those that formats.py describes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, reduce
from operator import or_

from cpu_kernels.activations import FIRST_SUMS, GROUP, GROUPS, POSITION, SECOND_SUMS, SUMS
from cpu_kernels.formats import FORMATS, Format
from cpu_kernels.simd import Emitter, Value, f16, f32, i8, i16, i32, i64

ORDER = [POSITION.index(i) for i in range(GROUPS)]
Scales = tuple[list[Value], list[tuple[Value, int]]]


def scales_and_offsets(k: Emitter, format: str, address: Value) -> Scales:
    """Of the chunk at `address`."""
    return _SCALES[format](k, address)


def block_of_a_group(format: str) -> int:
    """Bytes of a block that is a group and begins with its scale, a float16; 0: there are none."""
    is_one = format in _ONE_SCALE and FORMATS[format].block_size == GROUP
    return FORMATS[format].block_bytes if is_one else 0


def _one_scale(format: Format, k: Emitter, address: Value) -> Scales:
    """Blocks that begin with a float16."""
    scale = _halves(k, address, format)
    return [scale], [(scale, SUMS)]


def _scale_and_minimum(format: Format, k: Emitter, address: Value) -> Scales:
    minimum = _halves(k, address + 2, format)
    return [_halves(k, address, format)], [(minimum, SUMS)]


def _scale_and_zero(format: Format, k: Emitter, address: Value) -> Scales:
    scale = _halves(k, address, format)
    return [scale], [(scale * _halves(k, address + 2, format), SUMS)]


def _halves(k: Emitter, address: Value, format: Format) -> Value:
    """The float16 at the same place in the block of each group, as float32."""
    halves = []
    # Put together in general registers: the vector units are what a GEMV waits for.
    for four in (ORDER[:4], ORDER[4:]):
        word = None
        for index, group in enumerate(four):
            block = GROUP * group // format.block_size
            bits = k.load(address + format.block_bytes * block, i16(1))
            bits = bits.cast("zext", i64) << (16 * index)
            word = bits if word is None else word | bits
        halves.append(word)
    return k.gather(halves).view(f16(8)).cast("fpext", f32)


def _mxfp4(k: Emitter, address: Value) -> Scales:
    """Half (see groups.py) of 2^(byte - 127), as bits of a float32."""
    words = []
    for four in (ORDER[:4], ORDER[4:]):  # in general registers: see _halves
        bytes_ = [k.load(address + 17 * group, i8(1)).cast("zext", i32) for group in four]
        words.append(reduce(or_, [byte << (8 * i) for i, byte in enumerate(bytes_)]))
    exponent = k.gather(words).view(i8(GROUPS)).cast("zext", i32)
    tiny = (exponent + 1) << 21  # right below the normal numbers, and too little among them
    normal = (exponent - 1) << 23
    scale = k.maximum(tiny, normal).view(f32(GROUPS))
    return [scale], [(scale, SUMS)]


def _factor(k: Emitter, address: Value) -> Value:
    return k.splat(k.load(address, i16(1)), GROUPS).view(f16(GROUPS)).cast("fpext", f32)


def _in_words(k: Emitter, bytes_: Value, order: list[int], place: int = 0) -> Value:
    """The eight chosen ones of 16 bytes as byte `place` of words: i32 [8]. Written so that
    x86 needs one shuffle inside of 128 bits: to widen bytes takes AMD's Zen longer."""
    both = k.shuffle(bytes_, mask=[*range(16), *range(16)])
    mask = [32 if i % 4 != place else 16 * (i // 16) + order[i // 4] for i in range(32)]
    return k.shuffle(both, k.constant(both.type, 0), mask).view(i32(8))


def _scaled(k: Emitter, bytes_: Value, mask: list[int], factor: Value, zero: int = 0) -> Value:
    """(byte - zero) * factor of the chosen unsigned bytes."""
    integers = _in_words(k, bytes_, mask)
    return (integers - zero if zero else integers).cast("sitofp", f32) * factor


def _halves_of_groups(half: int) -> list[int]:
    return [2 * group + half for group in ORDER]


def _iq4_xs(k: Emitter, address: Value) -> Scales:
    """A factor; the upper 2 bits of eight scales in 2 bytes, the lower 4 in 4 bytes."""
    high = k.splat(k.load(address + 2, i16(1)).cast("zext", i32), GROUPS)
    low = k.splat(k.load(address + 4, i32(1)), GROUPS)
    integers = (low >> [4 * group for group in ORDER]) & 15
    integers = integers | (((high >> [2 * group for group in ORDER]) & 3) << 4)
    scale = (integers - 32).cast("sitofp", f32) * _factor(k, address)
    return [scale], [(scale, SUMS)]


def _q2_k(k: Emitter, address: Value) -> Scales:
    """A byte for each half of a group: 4 bits of scale, 4 bits of minimum; two factors at last."""
    bytes_ = k.load(address, i8(16))
    factors = _factor(k, address + 80), _factor(k, address + 82)
    scales, minima = [
        [_scaled(k, part, _halves_of_groups(half), factor) for half in (0, 1)]
        for part, factor in zip((bytes_ & 15, (bytes_ >> 4) & 15), factors, strict=True)
    ]
    return scales, [(minima[0], FIRST_SUMS), (minima[1], SECOND_SUMS)]


def _q3_k(k: Emitter, address: Value) -> Scales:
    """The lower 4 bits of sixteen scales in 8 bytes, the upper 2 in 4 bytes, and one factor."""
    a, b, c = [k.load(address + (96 + 4 * i), i32(1)) for i in range(3)]
    words = [
        ((low >> shift) & 0x0F0F0F0F) | (((c >> (2 * index)) & 0x03030303) << 4)
        for index, (low, shift) in enumerate(((a, 0), (b, 0), (a, 4), (b, 4)))
    ]
    bytes_, factor = k.gather(words).view(i8(16)), _factor(k, address + 108)
    scales = [_scaled(k, bytes_, _halves_of_groups(half), factor, zero=32) for half in (0, 1)]
    return scales, [(scales[0], FIRST_SUMS), (scales[1], SECOND_SUMS)]


def _six_bits(k: Emitter, address: Value) -> Scales:
    """q4_k and q5_k: two factors, then eight scales and eight minima of 6 bits in 12 bytes."""
    factors = k.splat(k.load(address, i32(1)), GROUPS // 2).view(f16(GROUPS)).cast("fpext", f32)
    ab, c = k.load(address + 4, i64(1)), k.load(address + 12, i32(1)).cast("zext", i64)
    c = (c & 0x0F0F0F0F) | ((c << 28) & 0x0F0F0F0F00000000)
    first, second = ab & 0x3F3F3F3F3F3F3F3F, c | ((ab >> 2) & 0x3030303030303030)
    bytes_ = k.gather([first, second]).view(i8(16))
    values = []
    for kind in (0, 1):
        order = [group % 4 + 4 * kind + 8 * (group // 4) for group in ORDER]
        integers = _in_words(k, bytes_, order)
        factor = k.shuffle(factors, mask=[2 * (lane // 2) + kind for lane in range(GROUPS)])
        values.append(integers.cast("sitofp", f32) * factor)
    return [values[0]], [(values[1], SUMS)]


def _q6_k(k: Emitter, address: Value) -> Scales:
    """A signed byte for each half of a group, and one factor."""
    # Bytes that are the highest of a word, so that they have their sign: times 2^24.
    factor, bytes_ = _factor(k, address + 208) * 2.0**-24, k.load(address + 192, i8(16))
    scales = [
        _in_words(k, bytes_, _halves_of_groups(half), place=3).cast("sitofp", f32) * factor
        for half in (0, 1)
    ]
    return scales, [(scales[0], FIRST_SUMS), (scales[1], SECOND_SUMS)]


def _for_blocks(scales: Callable[..., Scales], format: str) -> Callable[[Emitter, Value], Scales]:
    return partial(scales, FORMATS[format])


_ONE_SCALE = "q4_0", "q5_0", "q8_0", "iq4_nl", "nf4"
_SCALES: dict[str, Callable[[Emitter, Value], Scales]] = {
    **{f: _for_blocks(_one_scale, f) for f in _ONE_SCALE},
    **{f: _for_blocks(_scale_and_minimum, f) for f in ("q4_1", "q5_1")},
    "int4_g128": _for_blocks(_scale_and_zero, "int4_g128"),
    "mxfp4": _mxfp4,
    "iq4_xs": _iq4_xs,
    "q2_k": _q2_k,
    "q3_k": _q3_k,
    "q4_k": _six_bits,
    "q5_k": _six_bits,
    "q6_k": _q6_k,
}
