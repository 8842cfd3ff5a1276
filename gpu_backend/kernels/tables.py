"""Sixteen values that four bits stand for, looked up by permuting the bytes of four registers."""

from __future__ import annotations

import triton
import triton.language as tl

from gpu_backend.kernels.facts import table_word


@triton.jit
def permute(a, b, selector, EMULATE: tl.constexpr):
    """Four of the eight bytes of a (0 ... 3) and b (4 ... 7): those that the lower four nibbles of
    `selector`, each below 8, name."""
    if EMULATE:
        result = tl.zeros_like(selector)
        for byte in tl.static_range(4):
            chosen = (selector >> (4 * byte)) & 7
            value = tl.where(chosen < 4, a >> (8 * (chosen & 3)), b >> (8 * (chosen & 3))) & 255
            result |= value << (8 * byte)
        return result
    else:
        return tl.inline_asm_elementwise(
            "prmt.b32 $0, $1, $2, $3;", "=r,r,r,r", [a, b, selector], tl.int32, True, 1
        )


@triton.jit
def _table(codes, FORMAT: tl.constexpr, index: tl.constexpr):
    WORD: tl.constexpr = table_word(FORMAT, index)
    return tl.full(codes.shape, WORD, tl.int32)


@triton.jit
def look_up(codes, FORMAT: tl.constexpr, EMULATE: tl.constexpr):
    """Of int32 words with eight codes of 4 bits: the values of the bytes' lower codes, and of their
    upper ones, in two int32."""
    t0, t1 = _table(codes, FORMAT, 0), _table(codes, FORMAT, 1)
    t2, t3 = _table(codes, FORMAT, 2), _table(codes, FORMAT, 3)
    low = codes & 0x77777777
    # A code's highest bit says from which half of the table it is: byte i of one or the other.
    half = ((codes >> 1) & 0x44444444) | 0x32103210
    half = half & 0x77777777
    early = permute(permute(t0, t1, low, EMULATE), permute(t2, t3, low, EMULATE), half, EMULATE)
    low, half = low >> 16, half >> 16
    late = permute(permute(t0, t1, low, EMULATE), permute(t2, t3, low, EMULATE), half, EMULATE)
    even, odd = tl.full(codes.shape, 0x6420, tl.int32), tl.full(codes.shape, 0x7531, tl.int32)
    return permute(early, late, even, EMULATE), permute(early, late, odd, EMULATE)


@triton.jit
def look_up_one(code, FORMAT: tl.constexpr, EMULATE: tl.constexpr):
    """Of int32 with one code of 4 bits: its value in the lowest byte, and anything above."""
    low = code & 7
    early = permute(_table(code, FORMAT, 0), _table(code, FORMAT, 1), low, EMULATE)
    late = permute(_table(code, FORMAT, 2), _table(code, FORMAT, 3), low, EMULATE)
    return tl.where(code < 8, early, late)
