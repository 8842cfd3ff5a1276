"""The exponential function on vectors."""

from __future__ import annotations

from cpu_kernels.exponential_terms import (
    COEFFICIENTS,
    LARGEST,
    LN2_HIGH,
    LN2_LOW,
    LOG2_E,
    SHIFT,
)
from cpu_kernels.simd import Emitter, Value, i32


def exp(k: Emitter, x: Value) -> Value:
    """e to the power of each float32 lane, to 2e-7; 0 below -87, 6e37 above 87, NaN of NaN."""

    def constant(value: float) -> Value:
        return k.constant(x.type, value)

    y = k.select(x.compare(">", LARGEST), constant(LARGEST), x)
    # y = n ln 2 + r
    shift = constant(SHIFT)
    shifted = k.multiply_add(y, constant(LOG2_E), shift)
    n = shifted - shift
    r = k.multiply_add(n, constant(-LN2_HIGH), y)
    r = k.multiply_add(n, constant(-LN2_LOW), r)
    p = constant(COEFFICIENTS[0])
    for coefficient in COEFFICIENTS[1:]:
        p = k.multiply_add(p, r, constant(coefficient))
    p = k.multiply_add(p, r * r, r + 1.0)
    result = (p.view(i32(x.lanes)) + (shifted.view(i32(x.lanes)) << 23)).view(x.type)
    return k.select(y.compare("<", -LARGEST), constant(0.0), result)
