"""A layer's experts in one call: gate, up, SiLU, down, for the rows that each expert was given.

Nothing is gathered or scattered: kernels read the activations of the rows that they are told, and
write to rows that they are told. Threads share the rows of all experts' matrices in proportion to
their work, so that a few small experts keep all of them busy.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from cpu_kernels.activations import prepare_chosen
from cpu_kernels.compiler import inner
from cpu_kernels.dot import as_on_a_gpu
from cpu_kernels.gating import ACTIVATIONS, activate
from cpu_kernels.isa import Isa
from cpu_kernels.linear import FEW_ROWS, ROW_BLOCK, products_of
from cpu_kernels.memory import call_kernel, load_f32, load_i32, word
from cpu_kernels.record import fields
from cpu_kernels.team import barrier, next_task, op, part_of, parts_of
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


@op
def run_experts(r, thread, num_threads, team):
    """Everything, from h to out. An op by itself, and called by others; ends without a barrier."""
    hidden, num_rows = word(r, EXPERTS.hidden_size), word(r, EXPERTS.num_rows)
    h, prepared = word(r, EXPERTS.h), word(r, EXPERTS.prepared)
    prepare_chosen(h, hidden, num_rows, hidden, prepared, thread, num_threads)
    barrier(team)
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
    prepare_chosen(inner, size, num_pairs, size, inner_prepared, thread, num_threads)
    barrier(team)
    num_parts = parts_of(team, num_jobs * _divide_up(hidden, ROW_BLOCK))
    part = next_task(team, 1)
    while part < num_parts:
        _down(r, part, num_parts, team)
        part = next_task(team, 1)


class ExpertLayer:
    """The sizes and number formats of a layer's experts, for whoever runs them.

    `layout`'s gate, up and down have `format` and `shape`; `config` says `activation` and
    `activation_limit`; `biases`, if any, has float32 arrays gate, up and down, a row per expert.
    With `others`, layouts of the same shapes, expert e has the `kinds[e]`-th (int32
    [num_experts]) of `layout` and these.
    """

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
        tensors = [t for each in (layout, *others) for t in (each.gate, each.up, each.down)]
        kernels = [
            products_of(as_on_a_gpu(isa, t.format) if beside_gpu else isa, t.format, t.shape, exact)
            for t in tensors
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

    def _joined(self, biases: Any) -> np.ndarray:
        count, sizes = len(biases.gate), (self.expert_size, self.expert_size, self.hidden_size)
        for array, size in zip(biases, sizes, strict=True):
            if array.shape != (count, size):
                raise ValueError(f"biases must have shape {(count, size)}, not {array.shape}")
        return np.concatenate(biases, axis=1, dtype=np.float32)


def _checked(kinds: np.ndarray | None, count: int) -> np.ndarray:
    if kinds is None or kinds.dtype != np.int32 or not 0 <= kinds.min() <= kinds.max() < count:
        raise ValueError(f"kinds must be int32, each less than {count}, the number of layouts")
    return np.ascontiguousarray(kinds)
