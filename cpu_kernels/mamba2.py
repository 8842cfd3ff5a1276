"""Mamba-2 in one call: a layer that remembers a text in a matrix per head.

Projections, a short convolution over the last tokens, the state space model head by head, gates, a
norm by groups of heads, output. https://arxiv.org/abs/2405.21060
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from cpu_kernels.compiler import inner
from cpu_kernels.delta_rule import clear
from cpu_kernels.gating import silu_multiply
from cpu_kernels.lanes import LANES
from cpu_kernels.linear import multiply, prepare_activations, prepared_bytes
from cpu_kernels.memory import load_f32, store_f32, word
from cpu_kernels.norm import add, apply_norm, rms_norm_rows, rms_scale
from cpu_kernels.record import Record, check_shapes, fields, floats
from cpu_kernels.recurrent import RUNS, convolve, run_at
from cpu_kernels.simd import emitted, f32
from cpu_kernels.team import barrier, next_task, op, share

COLUMNS = LANES  # of a head's state that are computed at once

# A batch; `runs` is a record of RUNS. A row of `mixed` has values, keys and queries.
MAMBA_BATCH = fields("x num_rows runs normed prepared mixed_in mixed z steps decays values out")
# A layer: `history` and `state` are where it begins in a text's state, `conv` is [size, channels].
MAMBA = fields(
    "batch hidden_size eps norm z xbc dt conv conv_bias conv_size channels dt_bias decay skip "
    "out_norm out_eps o num_heads head_dim state_dim num_groups history state"
)


@emitted("void", "i64 i64 i64 i64 i64 i64 f32 f32 f32")
def state_step(k, state, key, query, value, out, state_dim, decay, step, skip):
    """One token and COLUMNS columns of a head's state S, [state_dim, COLUMNS]:

    S = decay * S + key (step * value);   out = query S + skip * value
    """
    values = k.load(value, f32(COLUMNS), align=4)
    written = values * k.splat(step, COLUMNS)
    total = k.variable(values * k.splat(skip, COLUMNS))
    with k.loop(state_dim) as i:
        at = state + i * (4 * COLUMNS)
        row = k.load(at, f32(COLUMNS), align=4) * k.splat(decay, COLUMNS)
        row = k.multiply_add(k.splat(k.load(key + i * 4, f32(1)), COLUMNS), written, row)
        k.store(at, row, align=4)
        wide = k.splat(k.load(query + i * 4, f32(1)), COLUMNS)
        total.set(k.multiply_add(wide, row, total.get()))
    k.store(out, total.get(), align=4)


@inner
def _prepare_steps(layer, batch, thread, num_threads):
    """Of this thread's rows: how far each head goes on, and what it keeps of its state."""
    num_heads = word(layer, MAMBA.num_heads)
    lo, hi = share(word(batch, MAMBA_BATCH.num_rows) * num_heads, thread, num_threads)
    for at in range(lo, hi):
        head = at % num_heads
        step = load_f32(word(batch, MAMBA_BATCH.steps), at)
        wide = np.float64(step + load_f32(word(layer, MAMBA.dt_bias), head))
        softplus = wide if wide > 30 else math.log1p(math.exp(wide))
        decay = math.exp(np.float64(load_f32(word(layer, MAMBA.decay), head)) * softplus)
        store_f32(word(batch, MAMBA_BATCH.steps), at, np.float32(softplus))
        store_f32(word(batch, MAMBA_BATCH.decays), at, np.float32(decay))


@inner
def _scan(layer, batch, team):
    """A task is a text, a head and a block of its columns: one token after the other."""
    num_heads, head_dim = word(layer, MAMBA.num_heads), word(layer, MAMBA.head_dim)
    state_dim, num_groups = word(layer, MAMBA.state_dim), word(layer, MAMBA.num_groups)
    channels, width = word(layer, MAMBA.channels), num_heads * head_dim
    mixed, values = word(batch, MAMBA_BATCH.mixed), word(batch, MAMBA_BATCH.values)
    num_blocks, runs = head_dim // COLUMNS, word(batch, MAMBA_BATCH.runs)
    num_tasks = word(runs, RUNS.count) * num_heads * num_blocks
    task = next_task(team, 0)
    while task < num_tasks:
        number, block = task // num_blocks, task % num_blocks
        number, head = number // num_heads, number % num_heads
        first, count, state, fresh = run_at(runs, number)
        state += word(layer, MAMBA.state) + 4 * COLUMNS * state_dim * (head * num_blocks + block)
        if fresh:
            clear(state, COLUMNS * state_dim)
        group, column = head // (num_heads // num_groups), head * head_dim + block * COLUMNS
        skip = load_f32(word(layer, MAMBA.skip), head)
        for row in range(first, first + count):
            start = mixed + 4 * row * channels
            key = start + 4 * (width + group * state_dim)
            query = key + 4 * num_groups * state_dim
            out = values + 4 * (row * width + column)
            decay = load_f32(word(batch, MAMBA_BATCH.decays), row * num_heads + head)
            step = load_f32(word(batch, MAMBA_BATCH.steps), row * num_heads + head)
            state_step(state, key, query, start + 4 * column, out, state_dim, decay, step, skip)
        task = next_task(team, 0)


@op
def mamba2(layer, thread, num_threads, team):
    batch, num_heads = word(layer, MAMBA.batch), word(layer, MAMBA.num_heads)
    num_rows, hidden_size = word(batch, MAMBA_BATCH.num_rows), word(layer, MAMBA.hidden_size)
    eps, prepared = load_f32(layer, 2 * MAMBA.eps), word(batch, MAMBA_BATCH.prepared)
    x, normed = word(batch, MAMBA_BATCH.x), word(batch, MAMBA_BATCH.normed)
    channels, width = word(layer, MAMBA.channels), num_heads * word(layer, MAMBA.head_dim)
    lo, hi = share(num_rows, thread, num_threads)
    rms_norm_rows(x, word(layer, MAMBA.norm), normed, lo, hi, hidden_size, eps)
    barrier(team)
    prepare_activations(normed, hidden_size, num_rows, hidden_size, prepared, thread, num_threads)
    barrier(team)
    gated, mixed_in = word(batch, MAMBA_BATCH.z), word(batch, MAMBA_BATCH.mixed_in)
    multiply(word(layer, MAMBA.z), prepared, num_rows, gated, width, team, 1)
    multiply(word(layer, MAMBA.xbc), prepared, num_rows, mixed_in, channels, team, 2)
    out = word(batch, MAMBA_BATCH.steps)
    multiply(word(layer, MAMBA.dt), prepared, num_rows, out, num_heads, team, 3)
    barrier(team)
    convolve(
        word(batch, MAMBA_BATCH.runs), mixed_in, word(batch, MAMBA_BATCH.mixed),
        word(layer, MAMBA.conv), word(layer, MAMBA.conv_bias), channels,
        word(layer, MAMBA.conv_size), word(layer, MAMBA.history), True, thread, num_threads,
    )  # fmt: skip
    _prepare_steps(layer, batch, thread, num_threads)
    barrier(team)
    _scan(layer, batch, team)
    barrier(team)
    num_groups = word(layer, MAMBA.num_groups)
    size, out_eps = width // num_groups, load_f32(layer, 2 * MAMBA.out_eps)
    first, last = share(num_rows * num_groups, thread, num_threads)
    for number in range(first, last):
        at, weight = gated + 4 * number * size, 4 * (number % num_groups) * size
        silu_multiply(at, word(batch, MAMBA_BATCH.values) + 4 * number * size, size)
        scale = rms_scale(at, size, out_eps)
        apply_norm(at, word(layer, MAMBA.out_norm) + weight, at, size, scale)
    barrier(team)
    prepare_activations(gated, width, num_rows, width, prepared, thread, num_threads)
    barrier(team)
    out = word(batch, MAMBA_BATCH.out)
    multiply(word(layer, MAMBA.o), prepared, num_rows, out, hidden_size, team, 4)
    barrier(team)
    lo, hi = share(num_rows * hidden_size, thread, num_threads)
    add(x + 4 * lo, out + 4 * lo, hi - lo)


class Mamba2Layer:
    """A layer's weights, ready for `RecurrentLayers.run`. `weights` has the attributes of
    tiered.backend.Mamba2Weights, its matrices are Matrix; `number` counts such layers from 0."""

    def __init__(self, weights: Any, config: Any, number: int, batch: Record) -> None:
        m, hidden, w = config.mamba2, config.hidden_size, weights
        if m.head_dim % COLUMNS or m.num_heads % m.num_groups:
            raise ValueError(
                f"heads of {m.head_dim} values must be a multiple of {COLUMNS}, and "
                f"{m.num_heads} of them a multiple of {m.num_groups} groups"
            )
        self.mamba2, self.hidden_size = m, hidden
        shapes = {
            "z": (m.inner_size, hidden),
            "xbc": (m.channels, hidden),
            "dt": (m.num_heads, hidden),
            "conv": (m.conv_size, m.channels),
            "o": (hidden, m.inner_size),
        }
        check_shapes("Mamba", w, shapes)
        start = 4 * number * m.state_values
        self._weights = w  # the record has only their addresses
        self.record = Record(
            MAMBA,
            batch=batch.address,
            hidden_size=hidden,
            eps=float(config.norm_eps),
            norm=floats(w.norm, "norm", hidden),
            **{name: getattr(w, name).address for name in ("z", "xbc", "dt", "o")},
            conv=np.ascontiguousarray(w.conv, np.float32),
            conv_bias=floats(w.conv_bias, "conv_bias", m.channels),
            conv_size=m.conv_size,
            channels=m.channels,
            dt_bias=floats(w.dt_bias, "dt_bias", m.num_heads),
            decay=floats(w.decay, "decay", m.num_heads),
            skip=floats(w.skip, "skip", m.num_heads),
            out_norm=floats(w.out_norm, "out_norm", m.inner_size),
            out_eps=float(m.norm_eps),
            num_heads=m.num_heads,
            head_dim=m.head_dim,
            state_dim=m.state_dim,
            num_groups=m.num_groups,
            history=start,
            state=start + 4 * (m.conv_size - 1) * m.channels,
        )
        self.op = mamba2
        _ = self.op.address  # compiled before the first token

    def rooms(self, n: int) -> dict[str, int]:
        """Bytes that n tokens need."""
        m, hidden = self.mamba2, self.hidden_size
        values = {
            "normed": hidden,
            "mixed_in": m.channels,
            "mixed": m.channels,
            "z": m.inner_size,
            "steps": m.num_heads,
            "decays": m.num_heads,
            "values": m.inner_size,
            "out": hidden,
        }
        rooms = {name: 4 * n * count for name, count in values.items()}
        return {**rooms, "prepared": prepared_bytes(n, max(hidden, m.inner_size))}
