"""Softmax of attention scores, a chunk of positions at a time, and the merging of chunks.

A *partial* is what one query head knows after some chunks, 64 bytes and a vector of values:
    float32 largest score, float32 sum of exp(score - largest), then, at byte 64, float32
    [padded_dim] the values weighted by exp(score - largest).
A sum of 0 marks a partial of no positions. The order of merging is the order of chunks, always.
https://arxiv.org/abs/2205.14135
"""

from __future__ import annotations

from cpu_kernels.exponential import exp
from cpu_kernels.lanes import LANES, larger, smaller
from cpu_kernels.simd import emitted, f32, i32

HEADER = 64
LARGEST, SUM = 0, 4
FLOOR = -3e38  # scores are kept within +-3e38, so that differences of infinities do not occur


@emitted("void", "i64 i64 i64 i64 i64 i64")
def limit_row(k, scores, first, last, lo, hi, partial):
    """Keep the scores of positions lo to hi - 1 within limits, set those outside to the lower one,
    in vectors first to last - 1; put the largest into the header of `partial`. lo < hi."""
    most = k.variable(k.constant(f32(LANES), FLOOR))

    def limit(at, lanes, visible):
        floor = k.constant(f32(lanes), FLOOR)
        value = smaller(k, k.load(at, f32(lanes), align=4), k.constant(f32(lanes), -FLOOR))
        value = larger(k, value, floor)
        value = value if visible is None else k.select(visible, value, floor)
        k.store(at, value, align=4)
        for part in k.parts(value, LANES):
            most.set(larger(k, part, most.get()))

    _each_vector(k, limit, scores, first, last, lo, hi)
    k.store(partial + LARGEST, k.largest(most.get()))


@emitted("void", "i64 i64 i64 i64 i64 i64")
def weigh_row(k, scores, first, last, lo, hi, partial):
    """Turn what limit_row left into exp(score - largest), and into 0 outside; put the sum into the
    header. A function of its own, so that a row's largest score is known well before it is needed:
    the row before is weighed meanwhile."""
    largest = k.load(partial + LARGEST, f32(1))
    total = k.variable(k.constant(f32(LANES), 0.0))

    def weigh(at, lanes, visible):
        value = exp(k, k.load(at, f32(lanes), align=4) - k.splat(largest, lanes))
        if visible is not None:
            value = k.select(visible, value, k.constant(f32(lanes), 0.0))
        k.store(at, value, align=4)
        for part in k.parts(value, LANES):
            total.set(total.get() + part)

    _each_vector(k, weigh, scores, first, last, lo, hi)
    k.store(partial + SUM, k.sum(total.get()))


def _each_vector(k, do, scores, first, last, lo, hi):
    """do(address, lanes, visible) for vectors first to last - 1, in order; `visible`: the lanes of
    positions lo to hi - 1, None for all. Whole vectors are done in pairs: the steps of exp wait
    for each other, and there is more to do meanwhile."""
    numbers = k.constant(i32(LANES), list(range(LANES)))

    def some(v):
        index = numbers + k.splat((v * LANES).cast("trunc", i32), LANES)
        above = index.compare(">=", k.splat(lo.cast("trunc", i32), LANES))
        return above & index.compare("<", k.splat(hi.cast("trunc", i32), LANES))

    whole_last = hi >> 4
    whole_first = k.minimum((lo + (LANES - 1)) >> 4, whole_last)
    pairs_last = whole_last - ((whole_last - whole_first) & 1)
    for start, end, vectors, mask in (
        (first, whole_first, 1, some),
        (whole_first, pairs_last, 2, None),
        (pairs_last, whole_last, 1, None),
        (whole_last, last, 1, some),
    ):
        with k.loop((end - start) >> (vectors - 1)) as i:
            v = start + i * vectors
            do(scores + v * (4 * LANES), vectors * LANES, mask(v) if mask else None)


@emitted("void", "i64 i64 i64 i64")
def empty_row(k, scores, first, last, partial):
    """The same for a row that sees none of the chunk's positions."""
    with k.loop(last - first) as i:
        k.store(scores + (first + i) * (4 * LANES), k.constant(f32(LANES), 0.0), align=4)
    k.store(partial + SUM, k.constant(f32(1), 0.0))


@emitted("void", "i64 i64 i64 i64")
def scale_row(k, scores, first, last, scales):
    """Multiply vectors first to last - 1 of a row with the scales of their positions."""
    with k.loop(last - first) as i:
        at = (first + i) * (4 * LANES)
        scale = k.load(scales + at, f32(LANES), align=4)
        k.store(scores + at, k.load(scores + at, f32(LANES), align=4) * scale, align=4)


def _exp_scalar(k, value):
    return exp(k, k.splat(value, LANES)).lane(0)


@emitted("void", "i64 i64 i64")
def merge(k, total, part, padded_dim):
    """Add the partial of a later chunk to `total`."""
    num_vectors = padded_dim >> 4
    part_sum, total_sum = k.load(part + SUM, f32(1)), k.load(total + SUM, f32(1))
    a, b = k.load(total + LARGEST, f32(1)), k.load(part + LARGEST, f32(1))
    with k.when(part_sum.compare(">", 0.0)):
        with k.when(total_sum.compare("==", 0.0)):
            k.store(total + LARGEST, b)
            k.store(total + SUM, part_sum)
            with k.loop(num_vectors) as v:
                at = v * (4 * LANES) + HEADER
                k.store(total + at, k.load(part + at, f32(LANES), align=4), align=4)
        with k.when(total_sum.compare(">", 0.0)):
            largest = larger(k, a, b)
            factor_a, factor_b = _exp_scalar(k, a - largest), _exp_scalar(k, b - largest)
            k.store(total + LARGEST, largest)
            k.store(total + SUM, k.multiply_add(total_sum, factor_a, part_sum * factor_b))
            wide_a, wide_b = k.splat(factor_a, LANES), k.splat(factor_b, LANES)
            with k.loop(num_vectors) as v:
                at = v * (4 * LANES) + HEADER
                new = k.load(part + at, f32(LANES), align=4) * wide_b
                old = k.load(total + at, f32(LANES), align=4)
                k.store(total + at, k.multiply_add(old, wide_a, new), align=4)


@emitted("void", "i64 i64 i64 f32 i64")
def finish(k, total, out, head_dim, sink, has_sink):
    """out = the weighted mean of the values; a sink is one more score, whose value is zero."""
    largest, sum = k.load(total + LARGEST, f32(1)), k.load(total + SUM, f32(1))
    most = larger(k, sink, largest)
    with_sink = k.multiply_add(sum, _exp_scalar(k, largest - most), _exp_scalar(k, sink - most))
    none = has_sink.compare("==", 0)
    one = k.constant(f32(1), 1.0)
    factor = k.select(none, one / sum, _exp_scalar(k, largest - most) / with_sink)
    num_vectors = head_dim >> 4
    with k.loop(num_vectors) as v:
        value = k.load(total + v * (4 * LANES) + HEADER, f32(LANES), align=4)
        k.store(out + v * (4 * LANES), value * k.splat(factor, LANES), align=4)
    done = num_vectors * LANES
    with k.loop(head_dim - done) as i:
        at = (done + i) * 4
        k.store(out + at, k.load(total + at + HEADER, f32(1)) * factor)
