"""The scales of a group of every row of a panel, and what is added to its integers: what scales.py
has of all groups of a row, with the same operations, so that every bit is the same.

A row has a 32-bit lane. Each function here is called for a chunk, with `words`: `words(offset)` are
the 16 bytes at that offset of every row's chunk, as four i32 [rows]. It returns a function that
gives a group's `scales` and `offsets`. What groups share is computed before; the others' bytes are
loaded for each group, as what comes before may be skipped.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from cpu_kernels.activations import FIRST_SUMS, GROUP, SECOND_SUMS, SUMS
from cpu_kernels.formats import FORMATS, Format
from cpu_kernels.scales import Scales
from cpu_kernels.simd import Emitter, Value, f16, f32, i16

Words = Callable[[int], list[Value]]
OfGroup = Callable[[int], Scales]


def panel_scales(k: Emitter, format: str, words: Words) -> OfGroup:
    return _SCALES[format](k, words)


def _low_half(word: Value) -> Value:
    """The float16 in the lower half of words, as float32."""
    return word.cast("trunc", i16).view(f16(word.lanes)).cast("fpext", f32)


def _high_half(word: Value) -> Value:
    return _low_half(word >> 16)


def _byte(words: list[Value], index: int) -> Value:
    """One of the words' bytes, unsigned."""
    word, byte = divmod(index, 4)
    return (words[word] >> (8 * byte)) & 255 if byte < 3 else words[word] >> 24


def _of_halves(scales: list[Value]) -> list[tuple[Value, int]]:
    return list(zip(scales, (FIRST_SUMS, SECOND_SUMS), strict=True))


def _start(format: Format, words: Words, group: int) -> Value:
    """The first word of the block of a group."""
    return words(format.block_bytes * (GROUP * group // format.block_size))[0]


def _one_scale(format: Format, k: Emitter, words: Words) -> OfGroup:
    def of_group(group: int) -> Scales:
        scale = _low_half(_start(format, words, group))
        return [scale], [(scale, SUMS)]

    return of_group


def _scale_and_minimum(format: Format, k: Emitter, words: Words) -> OfGroup:
    def of_group(group: int) -> Scales:
        word = _start(format, words, group)
        return [_low_half(word)], [(_high_half(word), SUMS)]

    return of_group


def _scale_and_zero(format: Format, k: Emitter, words: Words) -> OfGroup:
    def of_group(group: int) -> Scales:
        word = _start(format, words, group)
        scale = _low_half(word)
        return [scale], [(scale * _high_half(word), SUMS)]

    return of_group


def _mxfp4(format: Format, k: Emitter, words: Words) -> OfGroup:
    def of_group(group: int) -> Scales:
        exponent = _start(format, words, group) & 255
        bits = k.maximum((exponent + 1) << 21, (exponent - 1) << 23)
        scale = bits.view(f32(bits.lanes))
        return [scale], [(scale, SUMS)]

    return of_group


def _iq4_xs(k: Emitter, words: Words) -> OfGroup:
    first, low, _, _ = words(0)
    factor, high = _low_half(first), first >> 16

    def of_group(group: int) -> Scales:
        integers = ((low >> (4 * group)) & 15) | (((high >> (2 * group)) & 3) << 4)
        scale = (integers - 32).cast("sitofp", f32) * factor
        return [scale], [(scale, SUMS)]

    return of_group


def _q2_k(k: Emitter, words: Words) -> OfGroup:
    bytes_, last = words(0), words(68)[3]
    factors = _low_half(last), _high_half(last)

    def of_group(group: int) -> Scales:
        both = [_byte(bytes_, 2 * group + half) for half in (0, 1)]
        scales = [(byte & 15).cast("sitofp", f32) * factors[0] for byte in both]
        minima = [(byte >> 4).cast("sitofp", f32) * factors[1] for byte in both]
        return scales, _of_halves(minima)

    return of_group


def _q3_k(k: Emitter, words: Words) -> OfGroup:
    _, a, b, c = words(92)
    factor = _high_half(words(94)[3])
    bytes_ = [
        ((low >> shift) & 0x0F0F0F0F) | (((c >> (2 * index)) & 0x03030303) << 4)
        for index, (low, shift) in enumerate(((a, 0), (b, 0), (a, 4), (b, 4)))
    ]

    def of_group(group: int) -> Scales:
        both = [_byte(bytes_, 2 * group + half) for half in (0, 1)]
        scales = [(byte - 32).cast("sitofp", f32) * factor for byte in both]
        return scales, _of_halves(scales)

    return of_group


def _six_bits(k: Emitter, words: Words) -> OfGroup:
    first, a, b, c = words(0)
    factors = _low_half(first), _high_half(first)
    low, high = 0x0F0F0F0F, 0x30303030
    scales = [a & (low | high), (c & low) | ((a >> 2) & high)]
    minima = [b & (low | high), ((c >> 4) & low) | ((b >> 2) & high)]

    def of_group(group: int) -> Scales:
        scale, minimum = [
            _byte(own, group).cast("sitofp", f32) * factor
            for own, factor in zip((scales, minima), factors, strict=True)
        ]
        return [scale], [(minimum, SUMS)]

    return of_group


def _q6_k(k: Emitter, words: Words) -> OfGroup:
    bytes_, factor = words(192), _high_half(words(194)[3]) * 2.0**-24

    def of_group(group: int) -> Scales:
        word, first = bytes_[group // 2], 2 * (group % 2)
        # Bytes that are the highest of a word, so that they have their sign: times 2^24.
        highest = [(word << (24 - 8 * byte)) & -(1 << 24) for byte in (first, first + 1)]
        scales = [integers.cast("sitofp", f32) * factor for integers in highest]
        return scales, _of_halves(scales)

    return of_group


def _for_blocks(scales: Callable[..., OfGroup], format: str) -> Callable[[Emitter, Words], OfGroup]:
    return partial(scales, FORMATS[format])


_SCALES: dict[str, Callable[[Emitter, Words], OfGroup]] = {
    **{f: _for_blocks(_one_scale, f) for f in ("q4_0", "q5_0", "q8_0", "iq4_nl", "nf4")},
    **{f: _for_blocks(_scale_and_minimum, f) for f in ("q4_1", "q5_1")},
    "int4_g128": _for_blocks(_scale_and_zero, "int4_g128"),
    "mxfp4": _for_blocks(_mxfp4, "mxfp4"),
    "iq4_xs": _iq4_xs,
    "q2_k": _q2_k,
    "q3_k": _q3_k,
    "q4_k": _six_bits,
    "q5_k": _six_bits,
    "q6_k": _q6_k,
}
