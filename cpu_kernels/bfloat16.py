"""float32 rounded to bfloat16: the upper half of its bits, the nearest there is."""

from __future__ import annotations

import math

from cpu_kernels.simd import Emitter, Value, i16, i32


def plain_nan(k: Emitter, value: Value) -> Value:
    """float32 whose values that are no numbers have bits that stay so when they are rounded, like
    all that is computed from them."""
    return k.select(value.compare("==", value), value, k.constant(value.type, math.nan))


def rounded(value: Value) -> Value:
    """Words whose upper halves are float32 rounded to bfloat16."""
    return value.view(i32(value.lanes)) + 0x8000


def in_pairs(a: Value, b: Value) -> Value:
    """Words of one of a, in their lower halves, and one of b."""
    return (rounded(a) >> 16) | (rounded(b) & 0xFFFF0000)


def side_by_side(k: Emitter, a: Value, b: Value) -> Value:
    """Those of a, then those of b: i16 [twice as many]."""
    words = [rounded(value).view(i16(2 * value.lanes)) for value in (a, b)]
    return k.shuffle(*words, mask=range(1, 4 * a.lanes, 2))
