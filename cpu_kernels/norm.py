"""RMS norm (https://arxiv.org/abs/1910.07467) and, where a norm has biases, layer norm
(https://arxiv.org/abs/1607.06450)."""

from __future__ import annotations

from typing import Any

import numpy as np

from cpu_kernels.compiler import inner
from cpu_kernels.lanes import LANES, by_lanes, larger, smaller
from cpu_kernels.record import floats
from cpu_kernels.simd import emitted, f32


@emitted("f32", "i64 i64 f32")
def rms_scale(k, x, count, eps):
    """1 / sqrt(mean of squares + eps) of `count` float32."""
    sums = {n: k.variable(k.constant(f32(n), 0.0)) for n in (LANES, 1)}

    def add_square(offset, lanes):
        value = k.load(x + offset, f32(lanes), align=4)
        sums[lanes].set(k.multiply_add(value, value, sums[lanes].get()))

    by_lanes(k, count, add_square)
    total = k.sum(sums[LANES].get()) + sums[1].get()
    mean = total / count.cast("sitofp", f32) + eps
    return k.constant(f32(1), 1.0) / k.call("llvm.sqrt.f32", f32(1), mean)


@emitted("void", "i64 i64 i64 i64 f32")
def apply_norm(k, x, weight, out, count, scale):
    """out = x * scale * weight; `out` may be x."""

    def scale_values(offset, lanes):
        value = k.load(x + offset, f32(lanes), align=4) * k.splat(scale, lanes)
        k.store(out + offset, value * k.load(weight + offset, f32(lanes), align=4), align=4)

    by_lanes(k, count, scale_values)


@emitted("void", "i64 i64 i64 i64 i64 f32")
def layer_norm(k, x, weight, bias, out, count, eps):
    """out = (x - mean) / sqrt(variance + eps) * weight + bias, of `count` float32; `out` may be
    x."""
    number = count.cast("sitofp", f32)

    def mean_of(value_of):
        sums = {n: k.variable(k.constant(f32(n), 0.0)) for n in (LANES, 1)}

        def add_value(offset, lanes):
            value = value_of(k.load(x + offset, f32(lanes), align=4), lanes)
            sums[lanes].set(sums[lanes].get() + value)

        by_lanes(k, count, add_value)
        return (k.sum(sums[LANES].get()) + sums[1].get()) / number

    def squared(value, lanes):
        value = value - k.splat(mean, lanes)
        return value * value

    mean = mean_of(lambda value, lanes: value)
    deviation = k.call("llvm.sqrt.f32", f32(1), mean_of(squared) + eps)
    scale = k.constant(f32(1), 1.0) / deviation

    def apply(offset, lanes):
        value = k.load(x + offset, f32(lanes), align=4) - k.splat(mean, lanes)
        value = value * k.splat(scale, lanes) * k.load(weight + offset, f32(lanes), align=4)
        k.store(out + offset, value + k.load(bias + offset, f32(lanes), align=4), align=4)

    by_lanes(k, count, apply)


@emitted("void", "i64 i64 f32")
def clip(k, x, count, limit):
    """Clamp `count` float32 to +-limit."""

    def clip_values(offset, lanes):
        value = k.load(x + offset, f32(lanes), align=4)
        high = k.splat(limit, lanes)
        low = k.constant(f32(lanes), 0.0) - high
        k.store(x + offset, larger(k, smaller(k, value, high), low), align=4)

    by_lanes(k, count, clip_values)


@emitted("void", "i64 i64 i64")
def add(k, x, y, count):
    """x += y."""

    def add_values(offset, lanes):
        value = k.load(x + offset, f32(lanes), align=4)
        k.store(x + offset, value + k.load(y + offset, f32(lanes), align=4), align=4)

    by_lanes(k, count, add_values)


@emitted("void", "i64 i64 i64 f32")
def scaled_copy(k, x, out, count, factor):
    """out = x * factor."""

    def copy_values(offset, lanes):
        value = k.load(x + offset, f32(lanes), align=4)
        k.store(out + offset, value * k.splat(factor, lanes), align=4)

    by_lanes(k, count, copy_values)


@inner
def rms_norm_rows(x, weight, out, first, last, size, eps):
    """Norm rows first to last - 1, of `size` float32 each."""
    for row in range(first, last):
        source = x + 4 * row * size
        apply_norm(source, weight, out + 4 * row * size, size, rms_scale(source, size, eps))


@inner
def norm_rows(x, weight, bias, out, first, last, size, eps):
    """The same, or, unless the address `bias` is 0, layer norm."""
    if bias == 0:
        rms_norm_rows(x, weight, out, first, last, size, eps)
        return
    for row in range(first, last):
        at = 4 * row * size
        layer_norm(x + at, weight, bias, out + at, size, eps)


def norm_vectors(norm: np.ndarray | None, size: int) -> dict[str, Any]:
    """A record's `norm` and `norm_bias` (None in RMS norm), each float32 [size], of a norm whose
    weights are [size], or [2, size] with biases."""
    if norm is None or norm.ndim == 1:
        return {"norm": floats(norm, "norm", size), "norm_bias": None}
    return {"norm": floats(norm[0], "norm", size), "norm_bias": floats(norm[1], "norm_bias", size)}
