"""Gated DeltaNet in one call: a layer that remembers a text in a state of fixed size.

Projections, a short convolution over the last tokens, the delta rule head by head, a gated norm,
output. https://arxiv.org/abs/2412.06464
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from cpu_kernels.compiler import inner
from cpu_kernels.delta_rule import COLUMNS, clear, delta_step, dot
from cpu_kernels.gating import sigmoid, silu_multiply
from cpu_kernels.linear import multiply, prepare_activations, prepared_bytes
from cpu_kernels.memory import load_f32, store_f32, word
from cpu_kernels.norm import add, apply_norm, rms_norm_rows, rms_scale, scaled_copy
from cpu_kernels.record import Record, check_shapes, fields, floats
from cpu_kernels.recurrent import RUNS, convolve, run_at
from cpu_kernels.team import barrier, next_task, op, share

# A batch; `runs` is a record of RUNS.
DELTA_BATCH = fields(
    "x num_rows runs normed prepared mixed_in mixed z b a decays betas products out values"
)
# A layer: `state` and `history` are where it begins in a text's state, `conv` is [size, channels].
DELTA = fields(
    "batch hidden_size eps norm qkv z b a conv conv_size channels dt_bias decay head_norm o "
    "num_key_heads num_value_heads key_dim value_dim is_tiled history state"
)
NORM_EPS = np.float32(1e-6)  # of queries and keys


@inner
def _normalize(x, count, factor):
    scale = factor / np.float32(math.sqrt(dot(x, x, count) + NORM_EPS))
    scaled_copy(x, x, count, scale)


@inner
def _prepare_heads(layer, batch, thread, num_threads):
    """Of this thread's rows: unit queries and keys, and what the rule needs of each head."""
    key_heads, value_heads = word(layer, DELTA.num_key_heads), word(layer, DELTA.num_value_heads)
    key_dim, channels = word(layer, DELTA.key_dim), word(layer, DELTA.channels)
    lo, hi = share(word(batch, DELTA_BATCH.num_rows), thread, num_threads)
    factor = np.float32(1.0 / math.sqrt(key_dim))
    for row in range(lo, hi):
        queries = word(batch, DELTA_BATCH.mixed) + 4 * row * channels
        for head in range(key_heads):
            query = queries + 4 * head * key_dim
            key = query + 4 * key_heads * key_dim
            _normalize(query, key_dim, factor)
            _normalize(key, key_dim, np.float32(1.0))
            product = dot(query, key, key_dim)
            store_f32(word(batch, DELTA_BATCH.products), row * key_heads + head, product)
        for head in range(value_heads):
            at = row * value_heads + head
            step = load_f32(word(batch, DELTA_BATCH.a), at)
            step = np.float64(step + load_f32(word(layer, DELTA.dt_bias), head))
            softplus = step if step > 30 else math.log1p(math.exp(step))
            decay = math.exp(np.float64(load_f32(word(layer, DELTA.decay), head)) * softplus)
            store_f32(word(batch, DELTA_BATCH.decays), at, np.float32(decay))
            beta = sigmoid(load_f32(word(batch, DELTA_BATCH.b), at))
            store_f32(word(batch, DELTA_BATCH.betas), at, beta)


@inner
def _scan(layer, batch, team):
    """A task is a text, a head and a block of its columns: one token after the other."""
    key_heads, value_heads = word(layer, DELTA.num_key_heads), word(layer, DELTA.num_value_heads)
    key_dim, value_dim = word(layer, DELTA.key_dim), word(layer, DELTA.value_dim)
    channels, per_key = word(layer, DELTA.channels), value_heads // key_heads
    num_blocks = value_dim // COLUMNS
    mixed, values = word(batch, DELTA_BATCH.mixed), word(batch, DELTA_BATCH.values)
    runs = word(batch, DELTA_BATCH.runs)
    num_tasks = word(runs, RUNS.count) * value_heads * num_blocks
    task = next_task(team, 0)
    while task < num_tasks:
        number, block = task // num_blocks, task % num_blocks
        number, head = number // value_heads, number % value_heads
        first, count, state, fresh = run_at(runs, number)
        state += word(layer, DELTA.state) + 4 * COLUMNS * key_dim * (head * num_blocks + block)
        if fresh:
            clear(state, COLUMNS * key_dim)
        key_head = head % key_heads if word(layer, DELTA.is_tiled) else head // per_key
        column = head * value_dim + block * COLUMNS
        for row in range(first, first + count):
            query = mixed + 4 * (row * channels + key_head * key_dim)
            key = query + 4 * key_heads * key_dim
            value = mixed + 4 * (row * channels + 2 * key_heads * key_dim + column)
            out = values + 4 * (row * value_heads * value_dim + column)
            decay = load_f32(word(batch, DELTA_BATCH.decays), row * value_heads + head)
            beta = load_f32(word(batch, DELTA_BATCH.betas), row * value_heads + head)
            product = load_f32(word(batch, DELTA_BATCH.products), row * key_heads + key_head)
            delta_step(state, query, key, value, out, key_dim, decay, beta, product)
        task = next_task(team, 0)


@op
def delta_net(layer, thread, num_threads, team):
    batch = word(layer, DELTA.batch)
    num_rows, hidden_size = word(batch, DELTA_BATCH.num_rows), word(layer, DELTA.hidden_size)
    eps, prepared = load_f32(layer, 2 * DELTA.eps), word(batch, DELTA_BATCH.prepared)
    x, normed = word(batch, DELTA_BATCH.x), word(batch, DELTA_BATCH.normed)
    value_heads, value_dim = word(layer, DELTA.num_value_heads), word(layer, DELTA.value_dim)
    lo, hi = share(num_rows, thread, num_threads)
    rms_norm_rows(x, word(layer, DELTA.norm), normed, lo, hi, hidden_size, eps)
    barrier(team)
    prepare_activations(normed, hidden_size, num_rows, hidden_size, prepared, thread, num_threads)
    barrier(team)
    out, width = word(batch, DELTA_BATCH.mixed_in), word(layer, DELTA.channels)
    multiply(word(layer, DELTA.qkv), prepared, num_rows, out, width, team, 1)
    out, width = word(batch, DELTA_BATCH.z), value_heads * value_dim
    multiply(word(layer, DELTA.z), prepared, num_rows, out, width, team, 2)
    out = word(batch, DELTA_BATCH.b)
    multiply(word(layer, DELTA.b), prepared, num_rows, out, value_heads, team, 3)
    out = word(batch, DELTA_BATCH.a)
    multiply(word(layer, DELTA.a), prepared, num_rows, out, value_heads, team, 4)
    barrier(team)
    convolve(
        word(batch, DELTA_BATCH.runs), word(batch, DELTA_BATCH.mixed_in),
        word(batch, DELTA_BATCH.mixed), word(layer, DELTA.conv), 0, word(layer, DELTA.channels),
        word(layer, DELTA.conv_size), word(layer, DELTA.history), True, thread, num_threads,
    )  # fmt: skip
    barrier(team)
    _prepare_heads(layer, batch, thread, num_threads)
    barrier(team)
    _scan(layer, batch, team)
    barrier(team)
    values, gated = word(batch, DELTA_BATCH.values), word(batch, DELTA_BATCH.z)
    first, last = share(num_rows * value_heads, thread, num_threads)
    for number in range(first, last):
        head = values + 4 * number * value_dim
        factor = rms_scale(head, value_dim, eps)
        apply_norm(head, word(layer, DELTA.head_norm), head, value_dim, factor)
        silu_multiply(gated + 4 * number * value_dim, head, value_dim)
    barrier(team)
    prepare_activations(gated, width, num_rows, width, prepared, thread, num_threads)
    barrier(team)
    out = word(batch, DELTA_BATCH.out)
    multiply(word(layer, DELTA.o), prepared, num_rows, out, hidden_size, team, 5)
    barrier(team)
    lo, hi = share(num_rows * hidden_size, thread, num_threads)
    add(x + 4 * lo, out + 4 * lo, hi - lo)


class StateLayout(NamedTuple):
    """Where a text's state has what: float32, layer by layer."""

    history: int  # values of a layer's last tokens
    state: int  # values of its heads' matrices

    @property
    def per_layer(self) -> int:
        return self.history + self.state


def state_layout(config: Any) -> StateLayout:
    """`config` has the attributes of tiered.config.ModelConfig."""
    d = config.delta
    state = d.num_value_heads * d.key_dim * d.value_dim
    return StateLayout((d.conv_size - 1) * d.channels, state)


class DeltaLayer:
    """A layer's weights, ready for `RecurrentLayers.run`. `weights` has the attributes of
    tiered.backend.DeltaWeights, its matrices are Matrix; `number` counts such layers from 0."""

    def __init__(self, weights: Any, config: Any, number: int, batch: Record) -> None:
        d, hidden, w = config.delta, config.hidden_size, weights
        if d.value_dim % COLUMNS or d.num_value_heads % d.num_key_heads:
            raise ValueError(
                f"heads of {d.value_dim} values must be a multiple of {COLUMNS}, and "
                f"{d.num_value_heads} of them a multiple of {d.num_key_heads} heads of keys"
            )
        self.delta, self.hidden_size = d, hidden
        self.width = values = d.num_value_heads * d.value_dim
        shapes = {
            "qkv": (d.channels, hidden),
            "z": (values, hidden),
            "b": (d.num_value_heads, hidden),
            "a": (d.num_value_heads, hidden),
            "conv": (d.conv_size, d.channels),
            "o": (hidden, values),
        }
        check_shapes("delta", w, shapes)
        layout = state_layout(config)
        start = 4 * number * layout.per_layer
        self._weights = w  # the record has only their addresses
        self.record = Record(
            DELTA,
            batch=batch.address,
            hidden_size=hidden,
            eps=float(config.norm_eps),
            norm=floats(w.norm, "norm", hidden),
            **{name: getattr(w, name).address for name in ("qkv", "z", "b", "a", "o")},
            conv=np.ascontiguousarray(w.conv, np.float32),
            conv_size=d.conv_size,
            channels=d.channels,
            dt_bias=floats(w.dt_bias, "dt_bias", d.num_value_heads),
            decay=floats(w.decay, "decay", d.num_value_heads),
            head_norm=floats(w.head_norm, "head_norm", d.value_dim),
            num_key_heads=d.num_key_heads,
            num_value_heads=d.num_value_heads,
            key_dim=d.key_dim,
            value_dim=d.value_dim,
            is_tiled=int(d.is_tiled),
            history=start,
            state=start + 4 * layout.history,
        )
        self.op = delta_net
        _ = self.op.address  # compiled before the first token

    def rooms(self, n: int) -> dict[str, int]:
        """Bytes that n tokens need."""
        d, hidden, width = self.delta, self.hidden_size, self.width
        values = {
            "normed": hidden,
            "mixed_in": d.channels,
            "mixed": d.channels,
            "z": width,
            "b": d.num_value_heads,
            "a": d.num_value_heads,
            "decays": d.num_value_heads,
            "betas": d.num_value_heads,
            "products": d.num_key_heads,
            "values": width,
            "out": hidden,
        }
        rooms = {name: 4 * n * count for name, count in values.items()}
        return {**rooms, "prepared": prepared_bytes(n, max(hidden, width))}
