"""Vectors of 16 float32, which attention, norms and routers work with, and how they are stored.

LLVM makes one AVX-512 register of such a vector, two of AVX2 or four of NEON.
"""

from __future__ import annotations

from collections.abc import Callable

from cpu_kernels.simd import Emitter, Value, emitted, f16, f32, i8, i32

LANES = 16

# What the values of a KV cache, or of a packed copy of it, are stored as.
ELEMENT_BYTES = {"f32": 4, "f16": 2, "int8": 1}


def load_lanes(k: Emitter, kind: str, address: Value, lanes: int = LANES) -> Value:
    """float32 [lanes] from memory that holds them as `kind`."""
    if kind == "f32":
        return k.load(address, f32(lanes), align=4)
    if kind == "f16":
        return k.load(address, f16(lanes), align=2).cast("fpext", f32)
    return k.load(address, i8(lanes)).cast("sitofp", f32)


def store_value(k: Emitter, kind: str, address: Value, value: Value) -> None:
    """Round a float32 to `kind` and store it; what float16 cannot hold becomes its largest."""
    if kind == "f16":
        for sign, operator in ((1.0, ">"), (-1.0, "<")):
            limit = k.constant(f32(1), 65504.0 * sign)
            value = k.select(value.compare(operator, limit), limit, value)
        k.store(address, value.cast("fptrunc", f16))
    else:
        k.store(address, value if kind == "f32" else k.round(value).cast("fptosi", i8))


@emitted("void", "i64 i64 i64")
def store_i32(k, address, index, value):
    k.store(address + index * 4, value.cast("trunc", i32))


def larger(k: Emitter, a: Value, b: Value) -> Value:
    """The larger of two, lane by lane; `b` where one is not a number. One instruction on x86."""
    return k.select(a.compare(">", b), a, b)


def smaller(k: Emitter, a: Value, b: Value) -> Value:
    return k.select(a.compare("<", b), a, b)


def by_lanes(k: Emitter, count: Value, do: Callable[[Value, int], None]) -> None:
    """do(byte offset, lanes) for `count` float32: whole vectors, then the rest one by one."""
    num_vectors = count >> 4
    with k.loop(num_vectors) as v:
        do(v * (4 * LANES), LANES)
    done = num_vectors * LANES
    with k.loop(count - done) as i:
        do((done + i) * 4, 1)
