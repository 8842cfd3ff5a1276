"""The arithmetic of the gated delta rule, https://arxiv.org/abs/2412.06464, for blocks of columns.

A head's state is a matrix [key_dim, value_dim]. A token lets it decay, writes its value at its key
(less what was there already) and reads at its query:

    S = decay * S;   S += k (v - k S) * beta;   out = q S

State lies in memory by blocks of 16 columns, [value_dim / 16, key_dim, 16] float32: a block stays
in the first-level cache while all of a text's tokens pass through it.
"""

from __future__ import annotations

from cpu_kernels.lanes import LANES, by_lanes
from cpu_kernels.simd import emitted, f32

COLUMNS = LANES  # of a block


@emitted("void", "i64 i64 i64 i64 i64 i64 f32 f32 f32")
def delta_step(k, state, query, key, value, out, key_dim, decay, beta, product):
    """One token and one block; `product` is query times key. It reads the old state only once:
    q S' = decay * q S + (q k) * delta."""
    vector, zero = 4 * LANES, k.constant(f32(LANES), 0.0)
    seen, asked = k.variable(zero), k.variable(zero)
    with k.loop(key_dim) as i:
        row = k.load(state + i * vector, f32(LANES), align=4)
        wide_key = k.splat(k.load(key + i * 4, f32(1)), LANES)
        wide_query = k.splat(k.load(query + i * 4, f32(1)), LANES)
        seen.set(k.multiply_add(row, wide_key, seen.get()))
        asked.set(k.multiply_add(row, wide_query, asked.get()))
    wide_decay = k.splat(decay, LANES)
    delta = k.load(value, f32(LANES), align=4) - wide_decay * seen.get()
    delta = delta * k.splat(beta, LANES)
    k.store(out, k.multiply_add(wide_decay, asked.get(), k.splat(product, LANES) * delta), align=4)
    with k.loop(key_dim) as i:
        at = state + i * vector
        wide_key = k.splat(k.load(key + i * 4, f32(1)), LANES)
        row = k.load(at, f32(LANES), align=4) * wide_decay
        k.store(at, k.multiply_add(wide_key, delta, row), align=4)


@emitted("void", "i64 i64")
def clear(k, x, count):
    """Zeros to `count` float32."""

    def do(offset, lanes):
        k.store(x + offset, k.constant(f32(lanes), 0.0), align=4)

    by_lanes(k, count, do)


@emitted("void", "i64 i64 i64 i64 i64")
def add_product(k, x, weight, total, count, is_first):
    """total = x * weight, or += if it is not the first, of `count` float32."""

    def do(offset, lanes):
        product = k.load(x + offset, f32(lanes), align=4)
        product = product * k.load(weight + offset, f32(lanes), align=4)
        # Where it is the first, what is there may be anything, and is not added.
        first = is_first.compare("!=", 0)
        before = k.load(total + offset, f32(lanes), align=4)
        value = k.select(first, product, before + product)
        k.store(total + offset, value, align=4)

    by_lanes(k, count, do)


@emitted("f32", "i64 i64 i64")
def dot(k, x, y, count):
    """The sum of x * y over `count` float32."""
    sums = {n: k.variable(k.constant(f32(n), 0.0)) for n in (LANES, 1)}

    def do(offset, lanes):
        product = k.load(x + offset, f32(lanes), align=4) * k.load(y + offset, f32(lanes), align=4)
        sums[lanes].set(sums[lanes].get() + product)

    by_lanes(k, count, do)
    return k.sum(sums[LANES].get()) + sums[1].get()
