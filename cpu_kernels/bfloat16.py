"""float32 rounded to bfloat16: the upper half of its bits, the nearest there is."""

from __future__ import annotations

import math

from cpu_kernels.simd import Emitter, Value, i16, i32


def plain_nan(k: Emitter, value: Value) -> Value:
    """float32 whose values that are no numbers have bits that stay so when they are rounded, like
    all that is computed from them."""
    return k.select(value.compare("==", value), value, k.constant(value.type, math.nan))


def rounded(value: Value) -> Value:
    """float32 whose upper halves are bfloat16: i16 [2 * lanes]."""
    return (value.view(i32(value.lanes)) + 0x8000).view(i16(2 * value.lanes))


def side_by_side(k: Emitter, a: Value, b: Value) -> Value:
    """Those of a, then those of b: i16."""
    return k.shuffle(rounded(a), rounded(b), mask=range(1, 4 * a.lanes, 2))


def in_pairs(k: Emitter, a: Value, b: Value) -> Value:
    """The first of a, the first of b, the second of a and so on: i16."""
    mask = [lane for i in range(a.lanes) for lane in (2 * i + 1, 2 * (a.lanes + i) + 1)]
    return k.shuffle(rounded(a), rounded(b), mask=mask)
