"""Float weights to blocks of integers: q4_0 and q8_0 as ggml's reference does it (ggml-quants.c),
bit for bit; nf4 as QLoRA does it, the largest value exact; int4_g128 as GPTQ and AWQ choose scale
and zero, from the least to the largest value, 0 among them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import pairwise

import numpy as np
from numba import types

from cpu_kernels.cache import compiling
from cpu_kernels.compiler import called
from cpu_kernels.formats import FORMATS, NF4
from cpu_kernels.gemv import load_floats
from cpu_kernels.simd import Emitter, Value, emitted, f16, f32, i8, i32

GROUP = 32
MIDDLES = [(low + high) / 2 for low, high in pairwise(NF4)]


def _largest_bits(k: Emitter, values: Value) -> tuple[Value, Value]:
    """Absolute values as integers, which are ordered alike (NaN last), and the largest of them."""
    bits = values.view(i32(values.lanes)) & 0x7FFFFFFF
    return bits, k.largest(bits)


def _inverse(k: Emitter, scale: Value) -> Value:
    """1 / scale; 0 where the scale, as float16, is 0."""
    size = (scale.view(i32(1)) & 0x7FFFFFFF).view(f32(1))
    one, zero = k.constant(f32(1), 1.0), k.constant(f32(1), 0.0)
    return k.select(size.compare(">", 1e-30), one / scale, zero)


def _quantize_q4_0(k: Emitter, values: Value, target: Value) -> Value:
    """The value of largest size, the first of several, becomes code 0, which stands for -8."""
    bits, largest = _largest_bits(k, values)
    where = bits.compare("==", k.splat(largest, GROUP)).view(i32(1))
    negative = values.view(i32(GROUP)).compare("<", 0).view(i32(1))
    first = where & (k.constant(i32(1), 0) - where)
    size = largest.view(f32(1))
    is_negative = (negative & first).compare("!=", 0)
    scale = k.select(is_negative, size * 0.125, size * -0.125)
    scaled = values * k.splat(_inverse(k, scale), GROUP) + 8.5
    limit = k.constant(f32(GROUP), 15.0)
    scaled = k.select(scaled.compare("<", 15.0), scaled, limit)
    codes = scaled.cast("fptosi", i32).cast("trunc", i8)
    k.store(target, scale.cast("fptrunc", f16))
    k.store(target + 2, _nibbles(k, codes))
    return largest


def _nibbles(k: Emitter, codes: Value) -> Value:
    """Of each 32 codes, the first half in the lower bits of 16 bytes."""
    halves = [[], []]
    for lane in range(codes.lanes):
        halves[lane % GROUP // 16].append(lane)
    low, high = (k.shuffle(codes, mask=half) for half in halves)
    return low | (high << 4)


def _quantize_q8_0(k: Emitter, values: Value, target: Value) -> Value:
    _, largest = _largest_bits(k, values)
    scale = largest.view(f32(1)) / k.constant(f32(1), 127.0)
    scaled = values * k.splat(_inverse(k, scale), GROUP)
    half = k.constant(f32(GROUP), 0.5).view(i32(GROUP))
    half = half | (scaled.view(i32(GROUP)) & -0x80000000)
    codes = (scaled + half.view(f32(GROUP))).cast("fptosi", i32).cast("trunc", i8)
    k.store(target, scale.cast("fptrunc", f16))
    k.store(target + 2, codes)
    return largest


def _quantize_nf4(k: Emitter, values: Value, target: Value) -> Value:
    _, largest = _largest_bits(k, values)
    scale = largest.view(f32(1)) / k.constant(f32(1), float(NF4[-1]))
    scaled = values * k.splat(_inverse(k, scale), values.lanes)
    codes = k.constant(i8(values.lanes), 0)
    one, zero = k.constant(codes.type, 1), k.constant(codes.type, 0)
    for middle in MIDDLES:
        codes = codes + k.select(scaled.compare(">", middle), one, zero)
    k.store(target, scale.cast("fptrunc", f16))
    k.store(target + 2, _nibbles(k, codes))
    return largest


def _quantize_int4_g128(k: Emitter, values: Value, target: Value) -> Value:
    _, largest = _largest_bits(k, values)
    nothing = k.constant(f32(1), 0.0)
    above = k.maximum(k.largest(values), nothing)
    below = k.maximum(k.largest(values * -1.0), nothing)
    scale = (above + below) / k.constant(f32(1), 15.0)
    inverse = _inverse(k, scale)
    zero = k.round(below * inverse)
    scaled = values * k.splat(inverse, values.lanes) + k.splat(zero + 0.5, values.lanes)
    scaled = k.select(scaled.compare("<", 15.0), scaled, k.constant(scaled.type, 15.0))
    codes = scaled.cast("fptosi", i32).cast("trunc", i8)
    k.store(target, scale.cast("fptrunc", f16))
    k.store(target + 2, zero.cast("fptrunc", f16))
    k.store(target + 4, _nibbles(k, codes))
    return largest


_QUANTIZE = {
    "q4_0": _quantize_q4_0,
    "q8_0": _quantize_q8_0,
    "nf4": _quantize_nf4,
    "int4_g128": _quantize_int4_g128,
}


@emitted("i32", "i64 i64 i64")
def _quantize_blocks(k, source, format, values, target, num_blocks):
    """Returns the bits of the largest absolute value."""
    largest = k.variable(k.constant(i32(1), 0))
    size = FORMATS[format].block_size
    with k.loop(num_blocks) as i:
        block = load_floats(k, source, values + i * (size * FORMATS[source].block_bytes), size)
        bits = _QUANTIZE[format](k, block, target + i * FORMATS[format].block_bytes)
        largest.set(k.maximum(largest.get(), bits))
    return largest.get()


@cache
def _compiled(source: str, format: str) -> Callable[[int, int, int], int]:
    def quantize(values, target, num_blocks):
        return _quantize_blocks(source, format, values, target, num_blocks)

    with compiling():
        signature = types.int32(types.int64, types.int64, types.int64)
        return called(signature, nogil=True)(quantize)


def quantize_blocks(values: np.ndarray, source: str, format: str) -> tuple[np.ndarray, float]:
    """Blocks of q4_0, q8_0, nf4 or int4_g128 from values of format `source` (f32, f16 or bf16).

    `values`: contiguous bytes (of any dtype) of whole blocks of values. Returns uint8
    [num_blocks, block_bytes] and the largest absolute value, which is NaN if any value is.
    """
    num_values, rest = divmod(values.nbytes, FORMATS[source].block_bytes)
    size = FORMATS[format].block_size
    if rest or num_values % size or not values.flags.c_contiguous:
        raise ValueError(
            f"values must be a contiguous run of {source}, a multiple of {size} of them"
        )
    blocks = np.empty((num_values // size, FORMATS[format].block_bytes), np.uint8)
    run = _compiled(source, format)
    bits = run(values.ctypes.data, blocks.ctypes.data, num_values // size)
    return blocks, float(np.int32(bits).view(np.float32))
