"""A layer's experts in one call: gate, up, SiLU, down, for the rows that each expert was given.

Nothing is gathered or scattered: kernels read the activations of the rows that they are told, and
write to rows that they are told. Threads share the rows of all experts' matrices in proportion to
their work, so that a few small experts keep all of them busy.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from cpu_kernels.activations import prepare_activations
from cpu_kernels.compiler import inner
from cpu_kernels.dot import as_on_a_gpu
from cpu_kernels.gating import ACTIVATIONS, activate
from cpu_kernels.isa import Isa
from cpu_kernels.lanes import by_lanes
from cpu_kernels.linear import FEW_ROWS, ROW_BLOCK, products_of
from cpu_kernels.memory import call_kernel, load_f32, load_i32, word
from cpu_kernels.norm import scaled_copy
from cpu_kernels.record import Record, Scratch, fields
from cpu_kernels.simd import emitted, f32
from cpu_kernels.team import Team, barrier, next_task, op, part_of, parts_of, share
from cpu_kernels.workspace import Workspace

# What it costs to decode a row of weights, in rows of activations multiplied with it.
DECODING_COST = 2

GATE, UP, DOWN = range(3)
NUM_KERNELS = 6  # of one layout: for few rows and for many, of gate, up and down

# `kernels`: int64 [num_layouts, NUM_KERNELS]. `kinds`, if experts have several layouts: int32
# [num_experts], which of them each has. `biases`, if any: float32 [num_experts, 2 * expert_size +
# hidden_size] of gate, up and down. Job i takes the kind and the row of experts[i].
EXPERTS = fields(
    "h num_rows hidden_size expert_size num_jobs addresses starts pairs experts top_k out "
    "kernels kinds activation limit biases "
    "prepared gate_out up_out inner_prepared identity"
)
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
def _divide_up(a, b):
    return (a + b - 1) // b


@inner
def _job_rows(starts, job):
    """First row of a job, counted over all jobs, and how many it has."""
    first = np.int64(load_i32(starts, job))
    return first - np.int64(load_i32(starts, 0)), np.int64(load_i32(starts, job + 1)) - first


@inner
def _total_cost(starts, num_jobs, features):
    cost = 0
    for job in range(num_jobs):
        num_rows = _job_rows(starts, job)[1]
        if num_rows > 0:
            cost += _divide_up(features, ROW_BLOCK) * (num_rows + DECODING_COST)
    return cost


@inner
def _part_of_job(before, num_rows, features, low, high):
    """Output features [first, last) of a job that are within [low, high) of the whole cost."""
    cost = num_rows + DECODING_COST
    blocks = _divide_up(features, ROW_BLOCK)
    first = min(_divide_up(max(low - before, 0), cost), blocks)
    last = min(_divide_up(max(high - before, 0), cost), blocks)
    return first * ROW_BLOCK, min(last * ROW_BLOCK, features), before + blocks * cost


@inner
def _kernel(r, job, matrix, num_rows):
    """Address of what multiplies so many rows with a job's GATE, UP or DOWN."""
    kind = 0
    if word(r, EXPERTS.kinds) != 0:
        kind = np.int64(load_i32(word(r, EXPERTS.kinds), load_i32(word(r, EXPERTS.experts), job)))
    many = 0 if num_rows <= FEW_ROWS else 1
    return word(word(r, EXPERTS.kernels), NUM_KERNELS * kind + 2 * matrix + many)


@inner
def _bias(r, job, matrix):
    """Address of what a job's GATE, UP or DOWN adds; 0: nothing."""
    if word(r, EXPERTS.biases) == 0:
        return 0
    size, expert = word(r, EXPERTS.expert_size), load_i32(word(r, EXPERTS.experts), job)
    start = np.int64(expert) * (2 * size + word(r, EXPERTS.hidden_size)) + matrix * size
    return word(r, EXPERTS.biases) + 4 * start


@inner
def _gate_and_up(r, part, num_parts, team):
    """A part of the activated gate h, times up h, for every row of every job."""
    starts, num_jobs = word(r, EXPERTS.starts), word(r, EXPERTS.num_jobs)
    hidden, size = word(r, EXPERTS.hidden_size), word(r, EXPERTS.expert_size)
    prepared, identity = word(r, EXPERTS.prepared), word(r, EXPERTS.identity)
    gate_out, up_out = word(r, EXPERTS.gate_out), word(r, EXPERTS.up_out)
    pairs, top_k = word(r, EXPERTS.pairs), word(r, EXPERTS.top_k)
    activation, limit = word(r, EXPERTS.activation), load_f32(r, 2 * EXPERTS.limit)
    low, high = part_of(team, _total_cost(starts, num_jobs, size), part, num_parts)
    before = 0
    for job in range(num_jobs):
        row, num_rows = _job_rows(starts, job)
        if num_rows == 0:
            continue
        first, last, before = _part_of_job(before, num_rows, size, low, high)
        if first >= last:
            continue
        addresses = word(r, EXPERTS.addresses) + 24 * job
        x_rows = pairs + 4 * (row + np.int64(load_i32(starts, 0)))
        y_rows = identity + 4 * row
        for matrix in range(2):
            kernel = _kernel(r, job, matrix, num_rows)
            y = gate_out if matrix == GATE else up_out
            weights, bias = word(addresses, matrix), _bias(r, job, matrix)
            arguments = (
                weights, hidden, first, last, prepared, x_rows, top_k, num_rows, y, y_rows, size,
                bias,
            )  # fmt: skip
            call_kernel(kernel, arguments)
        for i in range(row, row + num_rows):
            at = 4 * (i * size + first)
            activate(activation, limit, gate_out + at, up_out + at, last - first)


@inner
def _down(r, part, num_parts, team):
    """A part of down @ inner, for every row of every job."""
    starts, num_jobs = word(r, EXPERTS.starts), word(r, EXPERTS.num_jobs)
    hidden, size = word(r, EXPERTS.hidden_size), word(r, EXPERTS.expert_size)
    prepared, identity = word(r, EXPERTS.inner_prepared), word(r, EXPERTS.identity)
    out, pairs = word(r, EXPERTS.out), word(r, EXPERTS.pairs)
    low, high = part_of(team, _total_cost(starts, num_jobs, hidden), part, num_parts)
    before = 0
    for job in range(num_jobs):
        row, num_rows = _job_rows(starts, job)
        if num_rows == 0:
            continue
        first, last, before = _part_of_job(before, num_rows, hidden, low, high)
        if first < last:
            kernel = _kernel(r, job, DOWN, num_rows)
            weights = word(word(r, EXPERTS.addresses) + 24 * job, DOWN)
            x_rows = identity + 4 * row
            y_rows, bias = pairs + 4 * (row + np.int64(load_i32(starts, 0))), _bias(r, job, DOWN)
            arguments = (
                weights, size, first, last, prepared, x_rows, 1, num_rows, out, y_rows, hidden,
                bias,
            )  # fmt: skip
            call_kernel(kernel, arguments)


@inner
def run_experts(r, thread, num_threads, team):
    """Everything, from prepared h to out; ends without a barrier."""
    starts, num_jobs = word(r, EXPERTS.starts), word(r, EXPERTS.num_jobs)
    num_pairs = np.int64(load_i32(starts, num_jobs)) - np.int64(load_i32(starts, 0))
    size, inner = word(r, EXPERTS.expert_size), word(r, EXPERTS.gate_out)
    num_parts = parts_of(team, num_jobs * _divide_up(size, ROW_BLOCK))
    part = next_task(team, 0)
    while part < num_parts:
        _gate_and_up(r, part, num_parts, team)
        part = next_task(team, 0)
    barrier(team)
    inner_prepared = word(r, EXPERTS.inner_prepared)
    prepare_activations(inner, size, num_pairs, size, inner_prepared, thread, num_threads)
    barrier(team)
    num_parts = parts_of(team, num_jobs * _divide_up(word(r, EXPERTS.hidden_size), ROW_BLOCK))
    part = next_task(team, 1)
    while part < num_parts:
        _down(r, part, num_parts, team)
        part = next_task(team, 1)


@inner
def prepare_h(r, thread, num_threads):
    hidden = word(r, EXPERTS.hidden_size)
    h, num_rows = word(r, EXPERTS.h), word(r, EXPERTS.num_rows)
    prepare_activations(h, hidden, num_rows, hidden, word(r, EXPERTS.prepared), thread, num_threads)


@op
def _experts(r, thread, num_threads, team):
    prepare_h(r, thread, num_threads)
    barrier(team)
    run_experts(r, thread, num_threads, team)


@inner
def add_pairs(r, thread, num_threads):
    """x[t] += sum over ranks, in order, of weights[t, rank] * out[t * top_k + rank]."""
    hidden, top_k = word(r, COMBINE.hidden_size), word(r, COMBINE.top_k)
    x, out, weights = word(r, COMBINE.x), word(r, COMBINE.out), word(r, COMBINE.weights)
    # Columns in blocks of 64, so that one row is shared, too.
    blocks = _divide_up(hidden, 64)
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


class ExpertLayer:
    """The sizes and number formats of a layer's experts, ready to run.

    `layout`'s gate, up and down have `format` and `shape`; `config` says `activation` and
    `activation_limit`; `biases`, if any, has float32 arrays gate, up and down, a row per expert.
    With `others`, layouts of the same shapes, expert e has the `kinds[e]`-th (int32
    [num_experts]) of `layout` and these.
    """

    chosen: Any = None  # the same for what a router chose: see cpu_kernels.chosen

    def __init__(
        self,
        layout: Any,
        config: Any,
        isa: Isa,
        exact: bool,
        workspace: Workspace,
        biases: Any = None,
        others: Sequence[Any] = (),
        kinds: np.ndarray | None = None,
        beside_gpu: bool = False,
    ) -> None:
        self.expert_size, self.hidden_size = layout.gate.shape
        for each in (layout, *others):
            shapes = each.gate.shape, each.up.shape, each.down.shape
            if shapes != (layout.gate.shape, layout.gate.shape, layout.gate.shape[::-1]):
                raise ValueError(f"gate, up and down do not fit together: {shapes}")
        self.workspace = workspace
        if config.activation not in ACTIVATIONS:
            raise ValueError(
                f"activation must be one of {', '.join(ACTIVATIONS)}, not {config.activation!r}"
            )
        formats = [t.format for each in (layout, *others) for t in (each.gate, each.up, each.down)]
        kernels = [
            products_of(as_on_a_gpu(isa, format) if beside_gpu else isa, format, exact)
            for format in formats
        ]
        self.facts: dict[str, Any] = {  # of a record, whatever it computes
            "hidden_size": self.hidden_size,
            "expert_size": self.expert_size,
            "activation": ACTIVATIONS.index(config.activation),
            "limit": float(config.activation_limit),
            "kernels": np.array(kernels, np.int64),
        }
        if others:
            self.facts["kinds"] = _checked(kinds, 1 + len(others))
        if biases is not None:
            self.facts["biases"] = self._joined(biases)
        self._asks_who = bool(others) or biases is not None
        self.record = Record(EXPERTS, **self.facts)
        _ = _experts.address  # compiled now rather than in the first token

    def _joined(self, biases: Any) -> np.ndarray:
        count, sizes = len(biases.gate), (self.expert_size, self.expert_size, self.hidden_size)
        for array, size in zip(biases, sizes, strict=True):
            if array.shape != (count, size):
                raise ValueError(f"biases must have shape {(count, size)}, not {array.shape}")
        return np.concatenate(biases, axis=1, dtype=np.float32)

    def run(
        self, team: Team, h: np.ndarray, addresses: np.ndarray, jobs: Any, out: np.ndarray
    ) -> None:
        """See Backend.experts. `jobs` has `experts`, `starts` and `pairs`; of the last two nobody
        may change what they hold."""
        num_jobs, num_pairs = len(jobs.starts) - 1, len(jobs.pairs)
        if num_jobs < 1:
            return
        if addresses.shape != (num_jobs, 3) or addresses.dtype != np.int64:
            raise ValueError(f"addresses must be int64 [{num_jobs}, 3]")
        team.finish()  # other layers that wait use the workspace, too
        space = self.workspace
        if not self.record.is_filled_for(h, out, num_jobs, num_pairs, space.version):
            self._fill(h, out, num_jobs, num_pairs)
        # Copied, because that is quicker than to ask for the address of a new array.
        space.arrays["addresses"][:num_jobs] = addresses
        if space.starts is not jobs.starts or space.pairs is not jobs.pairs:
            space.place(jobs.starts, jobs.pairs)
        if self._asks_who:
            space.arrays["experts"][:num_jobs] = jobs.experts
        team.run(_experts.address, self.record.address)

    def _fill(self, h: np.ndarray, out: np.ndarray, num_jobs: int, num_pairs: int) -> None:
        top_k, remainder = divmod(len(out), len(h))
        if h.dtype != np.float32 or out.dtype != np.float32 or remainder:
            raise ValueError("h and out must be float32, with top_k rows of out for each of h")
        if h.shape[1] != self.hidden_size or out.shape[1] != self.hidden_size:
            raise ValueError(f"h and out must have {self.hidden_size} columns")
        space = self.workspace
        space.reserve(len(h), self.hidden_size, num_pairs, self.expert_size, num_jobs)
        self.record.set(
            **space.arrays, h=h, out=out, num_rows=len(h), num_jobs=num_jobs, top_k=top_k
        )
        self.record.mark_filled_for(h, out, num_jobs, num_pairs, space.version)


def _checked(kinds: np.ndarray | None, count: int) -> np.ndarray:
    if kinds is None or kinds.dtype != np.int32 or not 0 <= kinds.min() <= kinds.max() < count:
        raise ValueError(f"kinds must be int32, each less than {count}, the number of layouts")
    return np.ascontiguousarray(kinds)


class Combine:
    """x[t] += sum over ranks, in order, of weights[t, rank] * out[t * top_k + rank]."""

    def __init__(self) -> None:
        self._weights = np.zeros((0, 0), np.float32)
        self.record = Record(COMBINE)

    def run(self, team: Team, x: np.ndarray, out: np.ndarray, weights: np.ndarray) -> None:
        num_rows, top_k = weights.shape
        team.finish()  # one that waits has other weights
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
        team.queue(_combine.address, self.record.address)


class Weighted:
    """A row for each pair of a token and an expert: weights[t, rank] * h[t]."""

    def __init__(self) -> None:
        self._scratch = Scratch()
        self._record = Record(WEIGHTED)

    def run(self, team: Team, h: np.ndarray, weights: np.ndarray) -> np.ndarray:
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
        team.run(_weighted.address, self._record.address)
        return out
