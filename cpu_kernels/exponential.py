"""The exponential function on vectors."""

from __future__ import annotations

from cpu_kernels.simd import Emitter, Value, i32


def exp(k: Emitter, x: Value) -> Value:
    """e to the power of each float32 lane, to 2e-7; 0 below -87, 6e37 above 87, NaN of NaN."""

    def constant(value: float) -> Value:
        return k.constant(x.type, value)

    y = k.select(x.compare(">", 87.0), constant(87.0), x)
    # y = n ln 2 + r; adding 1.5 * 2^23 rounds to a whole number and leaves it in the low bits.
    shift = constant(12582912.0)
    shifted = k.multiply_add(y, constant(1.44269504), shift)
    n = shifted - shift
    r = k.multiply_add(n, constant(-0.693145751953125), y)
    r = k.multiply_add(n, constant(-1.42860682e-06), r)
    p = constant(1.9875691500e-4)
    for coefficient in (
        1.3981999507e-3,
        8.3334519073e-3,
        4.1665795894e-2,
        1.6666665459e-1,
        5.0000001201e-1,
    ):
        p = k.multiply_add(p, r, constant(coefficient))
    p = k.multiply_add(p, r * r, r + 1.0)
    result = (p.view(i32(x.lanes)) + (shifted.view(i32(x.lanes)) << 23)).view(x.type)
    return k.select(y.compare("<", -87.0), constant(0.0), result)
