"""What a token's experts say, weighted and added; or what they are given, weighted."""

from __future__ import annotations

import numpy as np

from cpu_kernels.chain import Chain
from cpu_kernels.compiler import inner
from cpu_kernels.lanes import by_lanes
from cpu_kernels.memory import load_f32, word
from cpu_kernels.norm import scaled_copy
from cpu_kernels.record import Record, Scratch, fields
from cpu_kernels.simd import emitted, f32
from cpu_kernels.team import op, share

COMBINE = fields("x out weights num_rows top_k hidden_size")
WEIGHTED = fields("h out weights num_rows top_k hidden_size")


@emitted("void", "i64 i64 i64 f32")
def add_scaled(k, x, y, count, factor):
    """x += factor * y, of `count` float32."""

    def do(offset, lanes):
        y_values = k.load(y + offset, f32(lanes))
        sums = k.multiply_add(y_values, k.splat(factor, lanes), k.load(x + offset, f32(lanes)))
        k.store(x + offset, sums)

    by_lanes(k, count, do)


@inner
def add_pairs(r, thread, num_threads):
    """x[t] += sum over ranks, in order, of weights[t, rank] * out[t * top_k + rank]."""
    hidden, top_k = word(r, COMBINE.hidden_size), word(r, COMBINE.top_k)
    x, out, weights = word(r, COMBINE.x), word(r, COMBINE.out), word(r, COMBINE.weights)
    # Columns in blocks of 64, so that one row is shared, too.
    blocks = -(-hidden // 64)
    low, high = share(word(r, COMBINE.num_rows) * blocks, thread, num_threads)
    for i in range(low, high):
        row, block = i // blocks, i % blocks
        count = min(64, hidden - 64 * block)
        for pair in range(row * top_k, (row + 1) * top_k):
            source = out + 4 * (pair * hidden + 64 * block)
            target = x + 4 * (row * hidden + 64 * block)
            add_scaled(target, source, count, load_f32(weights, pair))


@op
def _combine(r, thread, num_threads, team):
    add_pairs(r, thread, num_threads)


@op
def _weighted(r, thread, num_threads, team):
    hidden, top_k = word(r, WEIGHTED.hidden_size), word(r, WEIGHTED.top_k)
    h, out, weights = word(r, WEIGHTED.h), word(r, WEIGHTED.out), word(r, WEIGHTED.weights)
    low, high = share(word(r, WEIGHTED.num_rows) * top_k, thread, num_threads)
    for pair in range(low, high):
        source, target = h + 4 * hidden * (pair // top_k), out + 4 * hidden * pair
        scaled_copy(source, target, hidden, load_f32(weights, pair))


class Combine:
    """x[t] += sum over ranks, in order, of weights[t, rank] * out[t * top_k + rank]."""

    def __init__(self) -> None:
        self._weights = np.zeros((0, 0), np.float32)
        self.record = Record(COMBINE)

    def run(self, chain: Chain, x: np.ndarray, out: np.ndarray, weights: np.ndarray) -> None:
        num_rows, top_k = weights.shape
        chain.finish()  # one that waits has other weights
        if not self.record.is_filled_for(x, out, num_rows, top_k):
            if x.shape[0] != num_rows or out.shape != (num_rows * top_k, x.shape[1]):
                raise ValueError(
                    f"shapes do not fit: x {x.shape}, out {out.shape}, weights {weights.shape}"
                )
            self._weights = np.empty((num_rows, top_k), np.float32)
            self.record.set(
                x=x, out=out, weights=self._weights, num_rows=num_rows, top_k=top_k,
                hidden_size=x.shape[1],
            )  # fmt: skip
            self.record.mark_filled_for(x, out, num_rows, top_k)
        # Copied, because that is quicker than to ask for the address of a new array.
        self._weights[:] = weights
        chain.queue(_combine.address, self.record.address)


class Weighted:
    """A row for each pair of a token and an expert: weights[t, rank] * h[t]."""

    def __init__(self) -> None:
        self._scratch = Scratch()
        self._record = Record(WEIGHTED)

    def run(self, chain: Chain, h: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """float32 [num_tokens * top_k, hidden_size], until the next call."""
        num_rows, top_k = weights.shape
        if h.dtype != np.float32 or len(h) != num_rows:
            raise ValueError(
                f"h must be float32 [{num_rows}, hidden_size], not {h.dtype} {h.shape}"
            )
        out = self._scratch.floats("out", num_rows * top_k, h.shape[1])
        self._record.set(
            h=h, out=out, weights=np.ascontiguousarray(weights, np.float32), num_rows=num_rows,
            top_k=top_k, hidden_size=h.shape[1],
        )  # fmt: skip
        chain.run(_weighted.address, self._record.address)
        return out
