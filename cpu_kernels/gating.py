"""Gates: what lies between an expert's first matrices and its last, and other products with a
sigmoid."""

from __future__ import annotations

import math

from cpu_kernels.compiler import inner
from cpu_kernels.exponential import exp
from cpu_kernels.lanes import by_lanes
from cpu_kernels.simd import emitted, f32

# An activation's number in records is its place here.
ACTIVATIONS = ("silu", "clamped_silu", "gelu_tanh")

CLAMPED_SLOPE = 1.702  # https://arxiv.org/abs/2508.10925


@inner
def activate(activation, limit, gate, up, count):
    """gate = activation(gate, up), of `count` float32 at these addresses."""
    if activation == 0:
        silu_multiply(gate, up, count)
    elif activation == 1:
        clamped_silu_multiply(gate, up, count, limit)
    else:
        gelu_tanh_multiply(gate, up, count)


@emitted("void", "i64 i64 i64")
def silu_multiply(k, gate, up, count):
    """gate * sigmoid(gate) * up"""

    def do(offset, lanes):
        g = k.load(gate + offset, f32(lanes))
        k.store(gate + offset, g * _sigmoid(k, g, lanes) * k.load(up + offset, f32(lanes)))

    by_lanes(k, count, do)


@emitted("void", "i64 i64 i64 f32")
def clamped_silu_multiply(k, gate, up, count, limit):
    """gpt-oss: gate * sigmoid(1.702 gate) * (up + 1), of clamped gate and up."""

    def do(offset, lanes):
        g, u = k.load(gate + offset, f32(lanes)), k.load(up + offset, f32(lanes))
        most = k.splat(limit, lanes)
        least = k.constant(f32(lanes), 0.0) - most
        # Selected like this, what is not a number stays so, and a damaged weight shows.
        g, u = k.select(g.compare(">", most), most, g), k.select(u.compare(">", most), most, u)
        u = k.select(u.compare("<", least), least, u)
        k.store(gate + offset, g * _sigmoid(k, g * CLAMPED_SLOPE, lanes) * (u + 1.0))

    by_lanes(k, count, do)


@emitted("void", "i64 i64 i64")
def gelu_tanh_multiply(k, gate, up, count):
    """gelu(gate) * up, with the tanh that approximates it: https://arxiv.org/abs/1606.08415.

    (1 + tanh(t)) / 2 is sigmoid(2t).
    """

    def do(offset, lanes):
        g = k.load(gate + offset, f32(lanes))
        twice = (g * g * 0.044715 + 1.0) * g * (2 * math.sqrt(2 / math.pi))
        k.store(gate + offset, g * _sigmoid(k, twice, lanes) * k.load(up + offset, f32(lanes)))

    by_lanes(k, count, do)


@emitted("void", "i64 i64 f32")
def soft_cap(k, x, count, cap):
    """cap * tanh(x / cap), in place"""

    def do(offset, lanes):
        most = k.splat(cap, lanes)
        value = _sigmoid(k, k.load(x + offset, f32(lanes)) / most * 2.0, lanes)
        k.store(x + offset, (value * 2.0 - 1.0) * most)

    by_lanes(k, count, do)


@emitted("void", "i64 i64")
def silu(k, x, count):
    """x * sigmoid(x), in place"""

    def do(offset, lanes):
        value = k.load(x + offset, f32(lanes))
        k.store(x + offset, value * _sigmoid(k, value, lanes))

    by_lanes(k, count, do)


@emitted("void", "i64 i64 i64")
def multiply_sigmoid(k, x, gate, count):
    """x *= sigmoid(gate)"""

    def do(offset, lanes):
        factor = _sigmoid(k, k.load(gate + offset, f32(lanes)), lanes)
        k.store(x + offset, k.load(x + offset, f32(lanes)) * factor)

    by_lanes(k, count, do)


@emitted("f32", "f32")
def sigmoid(k, value):
    return _sigmoid(k, value, 1)


def _sigmoid(k, value, lanes):
    one, zero = k.constant(f32(lanes), 1.0), k.constant(f32(lanes), 0.0)
    return one / (exp(k, zero - value) + 1.0)
