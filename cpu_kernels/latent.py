"""Multi-head latent attention in one call: https://arxiv.org/abs/2405.04434.

The cache holds one vector per token, of which every head has its own view: `k_b` turns a head's
query into one for that vector (its keys are never made), and `v_b` makes a head's values of the
weighted mean of vectors. So, between the two, this is attention with one head of keys, whose
values are the first `kv_rank` of them; the last `rope_dim` carry the position.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from cpu_kernels.activations import prepare_chosen
from cpu_kernels.compiler import inner
from cpu_kernels.flash import ATTENTION, BATCH, attend_chunk_kernel, run_attention
from cpu_kernels.kv import KV, append, padded
from cpu_kernels.linear import multiply, multiply_heads, prepare_activations, prepared_bytes
from cpu_kernels.memory import load_f32, load_i32, word
from cpu_kernels.norm import add, rms_norm_rows, scaled_copy
from cpu_kernels.record import Record, check_shapes, fields, floats
from cpu_kernels.rope import RopeTable, rotate_adjacent, rotate_half, rotation
from cpu_kernels.team import barrier, op, share
from cpu_kernels.tile import multiply_kernel

# `attention` is the address of a record of ATTENTION, for the part in the middle. `q` is a matrix
# of the normed rows, or, if there is a `q_a`, of what that makes of them.
LATENT = fields(
    "attention q q_a q_a_norm kv_a kv_a_norm k_b v_b q_rank kv_rank nope_dim rope_dim value_dim"
)


@inner
def _rotate(attention, x, angles):
    half = word(attention, ATTENTION.half)
    if word(attention, ATTENTION.adjacent):
        rotate_adjacent(x, angles, half)
    else:
        rotate_half(x, angles, half)


@inner
def _finish_rows(layer, thread, num_threads):
    """Of this thread's rows: norm and rotate what the cache keeps, and append it; scale the
    queries, and put their rotated ends where attention reads them."""
    attention = word(layer, LATENT.attention)
    batch, kv = word(attention, ATTENTION.batch), word(attention, ATTENTION.kv)
    num_heads, padded_dim = (
        word(attention, ATTENTION.num_heads),
        word(attention, ATTENTION.padded_dim),
    )
    rank, rope_dim = word(layer, LATENT.kv_rank), word(layer, LATENT.rope_dim)
    nope_dim, page_size = word(layer, LATENT.nope_dim), word(kv, KV.page_size)
    eps = load_f32(attention, 2 * ATTENTION.eps)
    scale = load_f32(attention, 2 * ATTENTION.query_scale)
    num_rows, query_size = word(batch, BATCH.num_rows), nope_dim + rope_dim
    latents = word(batch, BATCH.projected) + 4 * num_rows * num_heads * query_size
    angles = word(batch, BATCH.workspaces) + thread * word(batch, BATCH.workspace_bytes)
    lo, hi = share(num_rows, thread, num_threads)
    rms_norm_latents(latents, word(layer, LATENT.kv_a_norm), lo, hi, rank, rank + rope_dim, eps)
    for row in range(lo, hi):
        position = np.int64(load_i32(word(batch, BATCH.positions), row))
        fine, coarse = word(attention, ATTENTION.fine), word(attention, ATTENTION.coarse)
        rotation(coarse, fine, word(attention, ATTENTION.half), position, angles)
        latent = latents + 4 * row * (rank + rope_dim)
        _rotate(attention, latent + 4 * rank, angles)
        sequence = np.int64(load_i32(word(batch, BATCH.sequences), row))
        table = word(batch, BATCH.tables) + 4 * sequence * word(batch, BATCH.max_pages)
        page = np.int64(load_i32(table, position // page_size))
        append(kv, 0, latent, page, position % page_size, 0)
        append(kv, 1, latent, page, position % page_size, 0)
        for number in range(row * num_heads, (row + 1) * num_heads):
            query = word(batch, BATCH.projected) + 4 * number * query_size
            scaled_copy(query, query, query_size, scale)
            _rotate(attention, query + 4 * nope_dim, angles)
            target = word(batch, BATCH.queries) + 4 * (number * padded_dim + rank)
            scaled_copy(query + 4 * nope_dim, target, rope_dim, np.float32(1.0))


@inner
def rms_norm_latents(x, weight, first, last, size, step, eps):
    """Norm the first `size` of each of these rows, which are `step` float32 apart, in place."""
    for row in range(first, last):
        start = x + 4 * row * step
        rms_norm_rows(start, weight, start, 0, 1, size, eps)


@op
def latent_attention(layer, thread, num_threads, team):
    attention = word(layer, LATENT.attention)
    batch = word(attention, ATTENTION.batch)
    num_rows, hidden_size = word(batch, BATCH.num_rows), word(attention, ATTENTION.hidden_size)
    num_heads, head_dim = word(attention, ATTENTION.num_heads), word(attention, ATTENTION.head_dim)
    padded_dim, rank = word(attention, ATTENTION.padded_dim), word(layer, LATENT.kv_rank)
    nope_dim, rope_dim = word(layer, LATENT.nope_dim), word(layer, LATENT.rope_dim)
    q_rank, value_dim = word(layer, LATENT.q_rank), word(layer, LATENT.value_dim)
    eps = load_f32(attention, 2 * ATTENTION.eps)
    x, normed, prepared = (
        word(batch, BATCH.x),
        word(batch, BATCH.normed),
        word(batch, BATCH.prepared),
    )
    lo, hi = share(num_rows, thread, num_threads)
    rms_norm_rows(x, word(attention, ATTENTION.norm), normed, lo, hi, hidden_size, eps)
    barrier(team)
    prepare_activations(normed, hidden_size, num_rows, hidden_size, prepared, thread, num_threads)
    barrier(team)
    query_size, num_queries = nope_dim + rope_dim, num_rows * num_heads
    queries = word(batch, BATCH.projected)  # then the latents, then what q_a makes
    latents = queries + 4 * num_queries * query_size
    width, q, q_a = num_heads * query_size, word(layer, LATENT.q), word(layer, LATENT.q_a)
    kv_a = word(layer, LATENT.kv_a)
    multiply(kv_a, prepared, num_rows, latents, head_dim, team, 1)
    if q_a:
        first = latents + 4 * num_rows * head_dim
        multiply(q_a, prepared, num_rows, first, q_rank, team, 2)
        barrier(team)
        rms_norm_rows(first, word(layer, LATENT.q_a_norm), first, lo, hi, q_rank, eps)
        barrier(team)
        prepare_activations(first, q_rank, num_rows, q_rank, prepared, thread, num_threads)
        barrier(team)
    multiply(q, prepared, num_rows, queries, width, team, 3)
    barrier(team)
    _finish_rows(layer, thread, num_threads)
    barrier(team)
    prepare_chosen(queries, query_size, num_queries, nope_dim, prepared, thread, num_threads)
    barrier(team)
    heads, out = word(batch, BATCH.head_rows), word(batch, BATCH.queries)
    k_b = word(layer, LATENT.k_b)
    multiply_heads(k_b, num_heads, prepared, num_rows, heads, out, padded_dim, team, 5)
    barrier(team)
    run_attention(attention, thread, num_threads, team)
    attended, values = word(batch, BATCH.attended), word(batch, BATCH.values)
    prepare_chosen(attended, head_dim, num_queries, rank, prepared, thread, num_threads)
    barrier(team)
    v_b = word(layer, LATENT.v_b)
    multiply_heads(v_b, num_heads, prepared, num_rows, heads, values, value_dim, team, 6)
    barrier(team)
    width, out = num_heads * value_dim, word(batch, BATCH.out)
    prepare_activations(values, width, num_rows, width, prepared, thread, num_threads)
    barrier(team)
    o = word(attention, ATTENTION.o)
    multiply(o, prepared, num_rows, out, hidden_size, team, 4)
    barrier(team)
    lo, hi = share(num_rows * hidden_size, thread, num_threads)
    add(x + 4 * lo, out + 4 * lo, hi - lo)


class LatentGeometry(NamedTuple):
    """What decides how much memory latent attention needs."""

    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    padded_dim: int
    query_size: int
    q_rank: int
    kv_rank: int
    value_dim: int

    def rooms(self, num_rows: int) -> dict[str, int]:
        """Bytes, by field of BATCH."""
        num_queries = num_rows * self.num_heads
        prepared = (
            prepared_bytes(num_rows, max(self.hidden_size, self.q_rank)),
            prepared_bytes(num_queries, max(self.query_size, self.kv_rank)),
            prepared_bytes(num_rows, self.num_heads * self.value_dim),
        )
        width = self.num_heads * self.query_size + self.head_dim + self.q_rank
        return {
            "prepared": max(prepared),
            "projected": 4 * num_rows * width,
            "attended": 4 * num_queries * self.head_dim,
            "values": 4 * num_queries * self.value_dim,
        }

    def head_rows(self, num_rows: int) -> np.ndarray:
        """int32 [num_heads, num_rows]: which rows of queries, and of values, are a head's."""
        numbers = np.arange(num_rows * self.num_heads, dtype=np.int32)
        return np.ascontiguousarray(numbers.reshape(num_rows, self.num_heads).T)


class LatentAttentionLayer:
    """A layer's weights, ready for `Attention.run`. `weights` and `config` have the attributes of
    tiered.backend.LatentWeights and tiered.config.ModelConfig, its matrices are Matrix."""

    op = latent_attention

    def __init__(
        self, weights: Any, config: Any, index: int, batch: Record, rope: RopeTable
    ) -> None:
        c, latent = config, config.latent
        query_size = latent.nope_dim + latent.rope_dim
        self.geometry = LatentGeometry(
            c.hidden_size, c.num_heads, c.num_kv_heads, c.head_dim, padded(c.head_dim),
            query_size, latent.q_rank, latent.kv_rank, latent.value_dim,
        )  # fmt: skip
        heads = c.num_heads
        shapes = {
            "q": (heads * query_size, latent.q_rank or c.hidden_size),
            "kv_a": (c.head_dim, c.hidden_size),
            "k_b": (heads * latent.kv_rank, latent.nope_dim),
            "v_b": (heads * latent.value_dim, latent.kv_rank),
            "o": (c.hidden_size, heads * latent.value_dim),
        }
        if latent.q_rank or weights.q_a is not None:
            shapes["q_a"] = (latent.q_rank, c.hidden_size)
        check_shapes("latent attention", weights, shapes)
        self.rope = rope
        self._weights = weights  # the record has only their addresses
        self.attention = Record(
            ATTENTION,
            batch=batch.address,
            num_heads=heads,
            num_kv_heads=1,
            head_dim=c.head_dim,
            padded_dim=padded(c.head_dim),
            group=heads,
            window=c.window(index),
            hidden_size=c.hidden_size,
            eps=float(c.norm_eps),
            norm=floats(weights.norm, "norm", c.hidden_size),
            o=weights.o.address,
            query_scale=float(c.query_scale or query_size**-0.5),
            fine=rope.fine,
            coarse=rope.coarse,
            half=rope.half,
            adjacent=int(rope.pairs == "adjacent"),
            multiply=multiply_kernel("f32"),
            attend_chunk=attend_chunk_kernel(),
        )
        q_a = weights.q_a
        self.record = Record(
            LATENT,
            attention=self.attention.address,
            q=weights.q.address,
            q_a=0 if q_a is None else q_a.address,
            q_a_norm=floats(weights.q_a_norm, "q_a_norm", latent.q_rank),
            kv_a=weights.kv_a.address,
            kv_a_norm=floats(weights.kv_a_norm, "kv_a_norm", latent.kv_rank),
            k_b=weights.k_b.address,
            v_b=weights.v_b.address,
            q_rank=latent.q_rank,
            kv_rank=latent.kv_rank,
            nope_dim=latent.nope_dim,
            rope_dim=latent.rope_dim,
            value_dim=latent.value_dim,
        )
        _ = latent_attention.address  # compiled before the first token
