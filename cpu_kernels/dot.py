"""The instruction at the bottom of everything: dot products of four bytes in each 32-bit lane."""

from __future__ import annotations

from cpu_kernels.simd import Emitter, Value, i16, i32

# Instructions that multiply unsigned weights with signed activations, adding to 32-bit lanes.
_DPBUSD = {
    "avx512_vnni": "llvm.x86.avx512.vpdpbusd.512",
    "avx_vnni": "llvm.x86.avx512.vpdpbusd.256",
}
_WIDEST_SUM = 32767  # of an int16


def wants_unsigned(isa: str) -> bool:
    """Signed weights must get 128 added before they are multiplied."""
    return isa in _DPBUSD


def multiply_bytes(
    k: Emitter, isa: str, pairs: list[tuple[Value, Value]], largest: int, is_signed: bool
) -> Value:
    """Sum over `pairs` of weights [4 * n] i8 and activations [4 * n] i8: i32 [n].

    Lane i has the products of bytes 4i .. 4i + 3, exactly. `largest` bounds the weights.
    """
    lanes = pairs[0][0].lanes // 4
    total = k.constant(i32(lanes), 0)
    if isa in _DPBUSD:
        for weights, x in pairs:
            total = k.call(_DPBUSD[isa], i32(lanes), total, weights, x)
        return total
    if isa == "neon_dotprod":  # weights of up to 7 bits are as good as signed
        name = f"llvm.aarch64.neon.sdot.v{lanes}i32.v{4 * lanes}i8"
        for weights, x in pairs:
            total = k.call(name, i32(lanes), total, weights, x)
        return total
    if isa == "avx2":
        return _multiply_avx2(k, pairs, largest, is_signed)
    for weights, x in pairs:
        wide = weights.cast("sext" if is_signed else "zext", i16) * x.cast("sext", i16)
        for byte in range(4):
            lane = k.shuffle(wide, mask=[4 * i + byte for i in range(lanes)])
            total = total + lane.cast("sext", i32)
    return total


def _multiply_avx2(
    k: Emitter, pairs: list[tuple[Value, Value]], largest: int, is_signed: bool
) -> Value:
    """maddubs makes 16-bit sums of two products; as many as fit are added before the step to 32
    bits, which costs as much as a multiplication."""
    lanes = pairs[0][0].lanes // 4
    one = k.constant(i16(2 * lanes), 1)
    room = _WIDEST_SUM // (2 * 127 * largest)
    total = k.constant(i32(lanes), 0)
    for start in range(0, len(pairs), room):
        sums = k.constant(one.type, 0)
        for weights, x in pairs[start : start + room]:
            if is_signed:  # |w| is unsigned, and x takes the sign of w
                x = k.call("llvm.x86.avx2.psign.b", x.type, x, weights)
                negative = weights.compare("<", 0)
                weights = k.select(negative, weights * -1, weights)
            sums = sums + k.call("llvm.x86.avx2.pmadd.ub.sw", one.type, weights, x)
        total = total + k.call("llvm.x86.avx2.pmadd.wd", total.type, sums, one)
    return total
