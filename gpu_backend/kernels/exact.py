"""Float steps whose rounding is fixed, in a Triton kernel and in its interpreter alike.

`EMULATE` is true in the interpreter, which has no inline assembly and rounds `fma` twice.
"""

from __future__ import annotations

import triton
import triton.language as tl

from cpu_kernels import exponential_terms as terms

SHIFT, LOG2_E = tl.constexpr(terms.SHIFT), tl.constexpr(terms.LOG2_E)
LN2_HIGH, LN2_LOW = tl.constexpr(terms.LN2_HIGH), tl.constexpr(terms.LN2_LOW)
LARGEST, DEGREE = tl.constexpr(terms.LARGEST), tl.constexpr(len(terms.COEFFICIENTS))


@triton.constexpr_function
def coefficient(index):
    return terms.COEFFICIENTS[index]


@triton.jit
def fma(a, b, c, EMULATE: tl.constexpr):
    """a * b + c, rounded once."""
    if EMULATE:
        return (a.to(tl.float64) * b.to(tl.float64) + c.to(tl.float64)).to(tl.float32)
    else:
        return tl.fma(a, b, c)


@triton.jit
def dot_bytes(weights, x, total, SIGNED: tl.constexpr, EMULATE: tl.constexpr):
    """total + the products of four bytes of weights and activations in each int32."""
    if EMULATE:
        for byte in tl.static_range(4):
            w = (weights << (24 - 8 * byte)) >> 24
            if not SIGNED:
                w = w & 255
            total += w * ((x << (24 - 8 * byte)) >> 24)
        return total
    elif SIGNED:
        return tl.inline_asm_elementwise(
            "dp4a.s32.s32 $0, $1, $2, $3;", "=r,r,r,r", [weights, x, total], tl.int32, True, 1
        )
    else:
        return tl.inline_asm_elementwise(
            "dp4a.u32.s32 $0, $1, $2, $3;", "=r,r,r,r", [weights, x, total], tl.int32, True, 1
        )


@triton.jit
def total_of_groups(sums, ROWS: tl.constexpr):
    """Eight sums of each row, added in the order ((0+1) + (4+5)) + ((2+3) + (6+7))."""
    s = tl.reshape(sums, (ROWS, 2, 2, 2))  # bits of the group's number: 2, 1, 0
    s = tl.sum(s, axis=3)
    s = tl.sum(s, axis=1)
    return tl.sum(s, axis=1)


@triton.jit
def round_even(x):
    """To the nearest integer, halves to even, for |x| < 2**22."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def exponential(x, EMULATE: tl.constexpr):
    """e ** x to about 1e-7; 0 below -87, 6e37 above 87. See cpu_kernels.exponential."""
    y = tl.where(x > LARGEST, LARGEST, x)
    log2_of_e = tl.full(y.shape, LOG2_E, tl.float32)
    shifted = fma(y, log2_of_e, tl.full(y.shape, SHIFT, tl.float32), EMULATE)
    n = shifted - SHIFT
    r = fma(n, tl.full(y.shape, -LN2_HIGH, tl.float32), y, EMULATE)
    r = fma(n, tl.full(y.shape, -LN2_LOW, tl.float32), r, EMULATE)
    p = tl.full(y.shape, coefficient(0), tl.float32)
    for index in tl.static_range(1, DEGREE):
        p = fma(p, r, tl.full(y.shape, coefficient(index), tl.float32), EMULATE)
    p = fma(p, r * r, r + 1.0, EMULATE)
    bits = p.to(tl.int32, bitcast=True) + (shifted.to(tl.int32, bitcast=True) << 23)
    return tl.where(y < -LARGEST, 0.0, bits.to(tl.float32, bitcast=True))


@triton.jit
def sigmoid(x, EMULATE: tl.constexpr):
    """1 / (1 + exp(-x))"""
    one = tl.full(x.shape, 1.0, tl.float32)
    return tl.div_rn(one, 1.0 + exponential(-x, EMULATE))
