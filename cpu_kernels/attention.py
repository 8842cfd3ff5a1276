"""A layer's attention in one call: norm, projections, rope, KV cache, attention, output."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from cpu_kernels.batch import PreparedBatch
from cpu_kernels.chain import OF_ATTENTION, Chain, before_each_run
from cpu_kernels.compiler import inner
from cpu_kernels.flash import (
    ATTENTION,
    BATCH,
    attend_chunk_kernel,
    run_attention,
)
from cpu_kernels.gating import multiply_sigmoid
from cpu_kernels.kv import KV, KVPages, append, padded
from cpu_kernels.latent import LatentAttentionLayer
from cpu_kernels.linear import multiply, prepare_activations, prepared_bytes
from cpu_kernels.memory import load_f32, load_i32, word
from cpu_kernels.norm import (
    add,
    apply_norm,
    clip,
    norm_rows,
    norm_vectors,
    rms_norm_rows,
    rms_scale,
    scaled_copy,
)
from cpu_kernels.record import Record, check_shapes, floats
from cpu_kernels.rope import RopeTable, rotate_adjacent, rotate_half, rotation
from cpu_kernels.team import barrier, op, share
from cpu_kernels.tile import multiply_kernel


@inner
def _float(layer, field):
    return load_f32(layer + 8 * field, 0)


@inner
def _query_scale(layer, position):
    """What the queries at a position are multiplied with; where there are temperatures, the more
    the further on: https://arxiv.org/abs/2501.19399."""
    scale, step = _float(layer, ATTENTION.query_scale), word(layer, ATTENTION.temperature_step)
    if step == 0:
        return scale
    growth = np.float32(math.log(1.0 + (position + 1) // step))
    return scale * (_float(layer, ATTENTION.temperature) * growth + np.float32(1.0))


@inner
def _finish_heads(layer, thread, num_threads):
    """Norm, clip and rotate this thread's share of the heads of q, k and v; queries go to where
    attention reads them, keys and values into the KV cache."""
    batch, kv = word(layer, ATTENTION.batch), word(layer, ATTENTION.kv)
    head_dim, padded_dim = word(layer, ATTENTION.head_dim), word(layer, ATTENTION.padded_dim)
    num_heads, num_kv_heads = word(layer, ATTENTION.num_heads), word(layer, ATTENTION.num_kv_heads)
    group, half = word(layer, ATTENTION.group), word(layer, ATTENTION.half)
    norms = word(layer, ATTENTION.q_norm), word(layer, ATTENTION.k_norm)
    full = word(layer, ATTENTION.full_norm) != 0
    eps, limit = _float(layer, ATTENTION.eps), _float(layer, ATTENTION.clip)
    num_rows, num_all = word(batch, BATCH.num_rows), num_heads + 2 * num_kv_heads
    page_size = word(kv, KV.page_size)
    angles = word(batch, BATCH.workspaces) + thread * word(batch, BATCH.workspace_bytes)
    values = angles + 8 * padded_dim  # one head
    lo, hi = share(num_rows * num_all, thread, num_threads)
    last_row, position, scale = -1, 0, np.float32(0.0)
    q_scale, k_scale, query_scale = np.float32(0.0), np.float32(0.0), np.float32(0.0)
    for task in range(lo, hi):
        row, head = task // num_all, task % num_all
        projected = word(batch, BATCH.projected) + 4 * row * num_all * head_dim
        if row != last_row:
            last_row, position = row, np.int64(load_i32(word(batch, BATCH.positions), row))
            rotation(
                word(layer, ATTENTION.coarse), word(layer, ATTENTION.fine), half, position, angles
            )
            query_scale = _query_scale(layer, position)
            if full:
                q_scale = rms_scale(projected, num_heads * head_dim, eps)
                keys = projected + 4 * num_heads * head_dim
                k_scale = rms_scale(keys, num_kv_heads * head_dim, eps)
        source = projected + 4 * head * head_dim
        is_query, is_value = head < num_heads, head >= num_heads + num_kv_heads
        kv_head = head - num_heads if not is_value else head - num_heads - num_kv_heads
        weight = 0 if is_value else norms[0] if is_query else norms[1]
        factor = np.float32(1.0)
        if is_value and word(layer, ATTENTION.value_norm):
            factor = rms_scale(source, head_dim, eps)
        if weight:
            if full:
                weight += 4 * head_dim * (head if is_query else kv_head)
                scale = q_scale if is_query else k_scale
            else:
                scale = rms_scale(source, head_dim, eps)
            apply_norm(source, weight, values, head_dim, scale)
        else:
            scaled_copy(source, values, head_dim, factor)
        if limit > 0:
            clip(values, head_dim, limit)
        if not is_value:
            if word(layer, ATTENTION.adjacent):
                rotate_adjacent(values, angles, half)
            else:
                rotate_half(values, angles, half)
        if is_query:
            number = (head // group * num_rows + row) * group + head % group
            query = word(batch, BATCH.queries) + 4 * number * padded_dim
            scaled_copy(values, query, head_dim, query_scale)
        else:
            sequence = np.int64(load_i32(word(batch, BATCH.sequences), row))
            table = word(batch, BATCH.tables) + 4 * sequence * word(batch, BATCH.max_pages)
            page = np.int64(load_i32(table, position // page_size))
            append(kv, 1 if is_value else 0, values, page, position % page_size, kv_head)


@op
def attention(layer, thread, num_threads, team):
    batch = word(layer, ATTENTION.batch)
    num_rows, hidden_size = word(batch, BATCH.num_rows), word(layer, ATTENTION.hidden_size)
    q_size = word(layer, ATTENTION.num_heads) * word(layer, ATTENTION.head_dim)
    kv_size = word(layer, ATTENTION.num_kv_heads) * word(layer, ATTENTION.head_dim)
    x, normed = word(batch, BATCH.x), word(batch, BATCH.normed)
    lo, hi = share(num_rows, thread, num_threads)
    norm, bias = word(layer, ATTENTION.norm), word(layer, ATTENTION.norm_bias)
    norm_rows(x, norm, bias, normed, lo, hi, hidden_size, _float(layer, ATTENTION.eps))
    barrier(team)
    prepared = word(batch, BATCH.prepared)
    prepare_activations(normed, hidden_size, num_rows, hidden_size, prepared, thread, num_threads)
    barrier(team)
    out, width = word(batch, BATCH.projected), q_size + 2 * kv_size
    multiply(word(layer, ATTENTION.q), prepared, num_rows, out, width, team, 1)
    out += 4 * q_size
    multiply(word(layer, ATTENTION.k), prepared, num_rows, out, width, team, 2)
    out += 4 * kv_size
    multiply(word(layer, ATTENTION.v), prepared, num_rows, out, width, team, 3)
    gate, gates = word(layer, ATTENTION.gate), word(batch, BATCH.gates)
    if gate:
        multiply(gate, prepared, num_rows, gates, q_size, team, 4)
    barrier(team)
    _finish_heads(layer, thread, num_threads)
    barrier(team)
    run_attention(layer, thread, num_threads, team)
    attended, prepared = word(batch, BATCH.attended), word(batch, BATCH.prepared_out)
    if gate:
        lo, hi = share(num_rows * q_size, thread, num_threads)
        multiply_sigmoid(attended + 4 * lo, gates + 4 * lo, hi - lo)
        barrier(team)
    prepare_activations(attended, q_size, num_rows, q_size, prepared, thread, num_threads)
    barrier(team)
    out = word(batch, BATCH.out)
    multiply(word(layer, ATTENTION.o), prepared, num_rows, out, hidden_size, team, 5)
    barrier(team)
    norm = word(layer, ATTENTION.out_norm)
    if norm:
        lo, hi = share(num_rows, thread, num_threads)
        rms_norm_rows(out, norm, out, lo, hi, hidden_size, _float(layer, ATTENTION.eps))
        lo, hi = lo * hidden_size, hi * hidden_size
    else:
        lo, hi = share(num_rows * hidden_size, thread, num_threads)
    add(x + 4 * lo, out + 4 * lo, hi - lo)


class Geometry(NamedTuple):
    """What decides how much memory attention needs."""

    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    padded_dim: int
    is_gated: bool

    def rooms(self, num_rows: int) -> dict[str, int]:
        """Bytes, by field of BATCH."""
        width = self.num_heads * self.head_dim
        return {
            "prepared": prepared_bytes(num_rows, self.hidden_size),
            "projected": 4 * num_rows * (width + 2 * self.num_kv_heads * self.head_dim),
            "attended": 4 * num_rows * width,
            "prepared_out": prepared_bytes(num_rows, width),
            "gates": 4 * num_rows * width if self.is_gated else 0,
        }

    def head_rows(self, num_rows: int) -> None:
        """Only latent attention needs them."""


class AttentionLayer:
    """A layer's weights, ready for `Attention.run`. `weights` and `config` have the attributes of
    tiered.backend.AttentionWeights and tiered.config.ModelConfig, its matrices are Matrix."""

    op = attention

    def __init__(
        self, weights: Any, config: Any, index: int, batch: Record, rope: RopeTable
    ) -> None:
        c, shape = config, config.attention_shape(index)
        head_dim, num_kv_heads = shape.head_dim, shape.num_kv_heads
        self.geometry = Geometry(
            c.hidden_size, c.num_heads, num_kv_heads, head_dim, padded(head_dim),
            weights.gate is not None,
        )  # fmt: skip
        q_size, kv_size = c.num_heads * head_dim, num_kv_heads * head_dim
        if c.qk_norm not in ("", "head", "full", "unit"):
            raise ValueError(f'qk_norm must be "", "head", "full" or "unit", not {c.qk_norm!r}')
        full = c.qk_norm == "full"
        norm_shapes = (q_size, kv_size) if full else (head_dim, head_dim)
        has_norm = bool(c.qk_norm)
        shapes = {
            "q": (q_size, c.hidden_size),
            "k": (kv_size, c.hidden_size),
            "v": (kv_size, c.hidden_size),
            "o": (c.hidden_size, q_size),
        }
        if weights.gate is not None:
            shapes["gate"] = (q_size, c.hidden_size)
        check_shapes("attention", weights, shapes)
        self.rope = rope
        self._weights = weights  # the record has only their addresses
        self.record = self.attention = Record(
            ATTENTION,
            batch=batch.address,
            num_heads=c.num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            padded_dim=padded(head_dim),
            group=c.num_heads // num_kv_heads,
            window=c.window(index),
            chunked=int(c.chunked_attention and c.window(index) > 0),
            temperature=float(c.temperature),
            temperature_step=c.temperature_step if index in c.full_layers else 0,
            sinks=floats(weights.sinks, "sinks", c.num_heads),
            hidden_size=c.hidden_size,
            eps=float(c.norm_eps),
            **norm_vectors(weights.norm, c.hidden_size),
            q=weights.q.address,
            k=weights.k.address,
            v=weights.v.address,
            o=weights.o.address,
            gate=0 if weights.gate is None else weights.gate.address,
            q_norm=floats(weights.q_norm, "q_norm", norm_shapes[0]) if has_norm else None,
            k_norm=floats(weights.k_norm, "k_norm", norm_shapes[1]) if has_norm else None,
            full_norm=int(full),
            value_norm=int(c.value_norm),
            out_norm=floats(weights.out_norm, "out_norm", c.hidden_size),
            clip=float(c.clip_qkv),
            query_scale=float(c.query_scale or head_dim**-0.5),
            fine=rope.fine,
            coarse=rope.coarse,
            half=rope.half,
            adjacent=int(rope.pairs == "adjacent"),
            multiply=multiply_kernel("f32"),
            attend_chunk=attend_chunk_kernel(),
        )
        _ = attention.address  # compiled before the first token


class Attention:
    """All that attention layers share: the batch at hand, scratch memory, tables of angles.

    One call of `run` at a time.
    """

    def __init__(self, chain: Chain) -> None:
        self._chain = chain
        self._batch = PreparedBatch(chain)
        self._ropes: dict[Any, RopeTable] = {}

    def layer(self, weights: Any, config: Any, index: int) -> AttentionLayer:
        shape = config.attention_shape(index)
        rope = self._rope(shape.rope, shape.head_dim, config.context_length)
        return AttentionLayer(weights, config, index, self._batch.record, rope)

    def latent_layer(self, weights: Any, config: Any, index: int) -> LatentAttentionLayer:
        rope = self._rope(config.rope, config.head_dim, config.context_length)
        return LatentAttentionLayer(weights, config, index, self._batch.record, rope)

    def run(self, x: np.ndarray, layer: Any, kv: KVPages, index: int, batch: Any) -> None:
        """x += attention(norm(x)): float32 [num_tokens, hidden_size]; appends keys and values."""
        if not len(x):
            return
        self._batch.prepare(x, batch, kv, layer.geometry)
        self._use(layer, kv, index)
        self._chain.queue(layer.op.address, layer.record.address, OF_ATTENTION, before_each_run)

    @property
    def batch(self) -> tuple[Any, ...]:
        """What all layers know of the batch at hand: x, batch, kv and the geometry of layers."""
        return self._batch.current

    def again(self, x: np.ndarray, batch: Any, kv: KVPages, geometry: Any) -> bool:
        """Be ready to run all layers again on another batch; False: not as they are."""
        self._batch.prepare(x, batch, kv, geometry)
        needed = self._batch.num_positions
        return all(needed <= rope.num_positions for rope in self._ropes.values())

    def _rope(self, rope: Any, head_dim: int, context_length: int) -> RopeTable:
        key = rope, head_dim
        if key not in self._ropes:
            self._ropes[key] = RopeTable(rope, head_dim, context_length)
        return self._ropes[key]

    def _use(self, layer: Any, kv: KVPages, index: int) -> None:
        """Keep keys and values in layer `index` of kv; be ready for the batch's positions."""
        g, record, rope = layer.geometry, layer.attention, layer.rope
        rope.reserve(self._batch.num_positions)
        if not record.is_filled_for(kv.records[index], rope.coarse):
            if kv.shapes[index] != (g.num_kv_heads, g.head_dim):
                heads, size = kv.shapes[index]
                raise ValueError(
                    f"the KV cache has {heads} heads of {size} values, "
                    f"the layer {g.num_kv_heads} of {g.head_dim}"
                )
            self._chain.forget()  # it may wait to be run as it is
            record.set(kv=kv.records[index].address, coarse=rope.coarse)
            record.mark_filled_for(kv.records[index], rope.coarse)


def kv_pages(config: Any, num_pages: int, page_size: int, dtype: str) -> KVPages:
    """Room for the keys and values of all layers of a model that have them."""
    shapes = {layer: config.attention_shape(layer) for layer in config.attention_layers}
    sizes = {layer: (shape.num_kv_heads, shape.head_dim) for layer, shape in shapes.items()}
    return KVPages(sizes, num_pages, page_size, dtype)
