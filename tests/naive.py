"""A backend in plain NumPy: slow, obviously right. What the kernels are compared with."""

from __future__ import annotations

import ctypes
from contextlib import nullcontext

import numpy as np
from gguf import GGMLQuantizationType
from gguf.quants import dequantize

from cpu_kernels.formats import FORMATS
from tiered.experts import Routing


class NaiveMatrix:
    def __init__(self, data, format, shape, bias=None):
        row_bytes = FORMATS[format].row_bytes(shape[1])
        self.weight = to_float32(np.asarray(data)[: shape[0] * row_bytes], format, shape)
        self.bias = bias

    def __call__(self, x):
        y = x @ self.weight.T
        return y if self.bias is None else y + self.bias


def to_float32(data, format, shape):
    if format == "bf16":
        return (data.view(np.uint16).astype(np.uint32) << 16).view(np.float32).reshape(shape)
    if format in ("f32", "f16"):
        return data.view({"f32": "f4", "f16": "f2"}[format]).astype(np.float32).reshape(shape)
    kind = GGMLQuantizationType[format.upper()]
    return dequantize(data.reshape(shape[0], -1), kind).reshape(shape)


def at_address(address, nbytes):
    return np.ctypeslib.as_array((ctypes.c_uint8 * int(nbytes)).from_address(int(address)))


def rms_norm(x, weight, eps):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight


def layer_norm(x, weights, eps):
    """`weights`: [2, size], with biases."""
    centred = x - x.mean(-1, keepdims=True)
    scaled = centred / np.sqrt((centred * centred).mean(-1, keepdims=True) + eps)
    return scaled * weights[0] + weights[1]


def norm_of(x, weights, eps):
    return (rms_norm if weights.ndim == 1 else layer_norm)(x, weights, eps)


def sparse_mixer(logits, top_k, jitter):
    """Experts and weights of one row."""
    logits, experts, weights = np.array(logits), [], []
    for _ in range(top_k):
        best = int(logits.argmax())
        left = logits[np.isfinite(logits)]
        with np.errstate(invalid="ignore"):  # 0 / 0 is not too far below
            below = (logits[best] - left) / np.maximum(np.abs(left), logits[best])
        near = left[~(below > 2 * jitter)]
        experts.append(best)
        weights.append(1 / np.exp(near - logits[best]).sum())
        logits[best] = -np.inf
    return experts, weights


def silu(x):
    return x / (1 + np.exp(-x))


def gated(gate, up, config):
    if config.activation == "silu":
        return silu(gate) * up
    if config.activation == "gelu_tanh":
        return 0.5 * gate * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3))) * up
    assert config.activation == "clamped_silu"
    limit = config.activation_limit
    gate, up = np.minimum(gate, limit), np.clip(up, -limit, limit)
    return gate * sigmoid(1.702 * gate) * (up + 1)


def only_best_groups(choices, config):
    """-inf for the experts of other groups."""
    groups = choices.reshape(len(choices), config.expert_groups, -1)
    num_best = 2 if config.router_scoring == "sigmoid" else 1
    scores = np.sort(groups, -1)[..., -num_best:].sum(-1)
    dropped = np.argsort(-scores, -1, kind="stable")[:, config.used_groups :]
    masked = groups.copy()
    np.put_along_axis(masked, dropped[..., None], -np.inf, 1)
    return masked.reshape(choices.shape)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def rope(x, positions, config):
    """x: [num_tokens, heads, head_dim]."""
    dim = config.dim or x.shape[-1]
    half = dim // 2
    frequency = config.theta ** (-np.arange(half) * 2.0 / dim)
    if config.inv_freq_scale:
        frequency = frequency / np.asarray(config.inv_freq_scale)
    angle = np.asarray(positions)[:, None, None] * frequency
    cos, sin = np.cos(angle) * config.magnitude, np.sin(angle) * config.magnitude
    out = x.copy()
    first, second = (
        (slice(0, half), slice(half, dim))
        if config.pairs == "half"
        else (slice(0, dim, 2), slice(1, dim, 2))
    )
    out[..., first] = x[..., first] * cos - x[..., second] * sin
    out[..., second] = x[..., second] * cos + x[..., first] * sin
    return out.astype(np.float32)


class NaiveBackend:
    name = "naive"
    isa = "numpy"
    num_threads = 1
    few_rows = 8
    finds_experts = False
    seconds = 0.0

    def chain(self, num_tokens, layers):
        return nullcontext()

    def again(self, layers, table, batch, kv, scale=1.0):
        return None

    def chained_seconds(self):
        return {}

    def matrix(self, data, format, shape, bias=None):
        return NaiveMatrix(data, format, shape, bias)

    def attention_layer(self, weights, config, index=0):
        return weights, config, config.window(index), config.attention_shape(index)

    def router_layer(self, weights, config):
        return weights, config

    def merge_layer(self, weights, config):
        return weights, config

    def expert_layer(self, layout, config, biases=None):
        self.hidden_size = config.hidden_size
        return layout, config, biases

    def feed_forward_layer(self, weights, config, norm=None):
        return weights, config, norm

    def of_layer(self, index):
        return self

    def take(self, x):
        return x

    def kv_pages(self, config, num_pages, page_size, dtype):
        shapes = [config.attention_shape(layer) for layer in range(config.num_layers)]
        return [
            np.zeros((2, num_pages, page_size, s.num_kv_heads, s.head_dim), np.float32)
            for s in shapes
        ]

    def embed(self, table, tokens, scale=1.0):
        return table.weight[tokens] * np.float32(scale)

    def attention(self, x, layer, kv, index, batch):
        w, c, window, shape = layer
        h = norm_of(x, w.norm, c.norm_eps)
        q, k, v = w.q(h), w.k(h), w.v(h)
        if c.qk_norm == "full":
            q, k = rms_norm(q, w.q_norm, c.norm_eps), rms_norm(k, w.k_norm, c.norm_eps)
        if c.clip_qkv:
            q, k, v = (np.clip(t, -c.clip_qkv, c.clip_qkv) for t in (q, k, v))
        q, k, v = (t.reshape(len(x), -1, shape.head_dim) for t in (q, k, v))
        if c.qk_norm in ("head", "unit") and w.q_norm is not None:
            q, k = rms_norm(q, w.q_norm, c.norm_eps), rms_norm(k, w.k_norm, c.norm_eps)
        if c.value_norm:
            v = rms_norm(v, np.ones(shape.head_dim, np.float32), c.norm_eps)
        q, k = rope(q, batch.positions, shape.rope), rope(k, batch.positions, shape.rope)
        keys_of, values_of = kv[index]
        page_size = keys_of.shape[1]
        out = np.empty_like(q)
        for row in range(len(x)):
            table = batch.page_tables[batch.sequences[row]]
            at = batch.positions[row]
            keys_of[table[at // page_size], at % page_size] = k[row]
            values_of[table[at // page_size], at % page_size] = v[row]
        for row in range(len(x)):
            table = batch.page_tables[batch.sequences[row]]
            start = 0
            if window:
                start = max(0, batch.positions[row] + 1 - window)
            at = np.arange(start, batch.positions[row] + 1)
            keys, values = (t[table[at // page_size], at % page_size] for t in kv[index])
            group = c.num_heads // shape.num_kv_heads
            keys, values = np.repeat(keys, group, 1), np.repeat(values, group, 1)
            scores = np.einsum("hd,thd->ht", q[row], keys)
            scores *= c.query_scale or shape.head_dim**-0.5
            if w.sinks is not None:  # one more score, whose value is zero
                scores = np.concatenate([scores, w.sinks[:, None]], 1)
                values = np.concatenate([values, np.zeros_like(values[:1])])
            scores = softmax(scores)
            out[row] = np.einsum("ht,thd->hd", scores, values)
        out = w.o(out.reshape(len(x), -1))
        x += out if w.out_norm is None else rms_norm(out, w.out_norm, c.norm_eps)

    def route(self, x, layer):
        weights, config = layer
        h = norm_of(x, weights.norm, config.norm_eps)
        return h, self.guess(x, h, layer)

    def guess(self, x, h, layer):
        (_, router, correction, own_norm, scales), config = layer
        if own_norm is not None:
            h = rms_norm(x, own_norm, config.norm_eps)
        logits = router(h)
        if config.router_scoring == "sparsemixer":
            rows = [sparse_mixer(row, config.top_k, config.router_jitter) for row in logits]
            experts, weights = zip(*rows, strict=True)
            return Routing(np.array(experts, np.int32), np.array(weights, np.float32))
        scores = softmax(logits) if config.router_scoring == "softmax" else sigmoid(logits)
        choices = scores if correction is None else scores + correction
        if config.expert_groups > 1:
            choices = only_best_groups(choices, config)
        experts = np.argsort(-choices, -1, kind="stable")[:, : config.top_k].astype(np.int32)
        weights = np.take_along_axis(scores, experts, -1)
        if config.normalize_top_k:
            weights /= weights.sum(-1, keepdims=True)
        if scales is not None:
            weights = weights * scales[experts]
        return Routing(experts, weights * np.float32(config.routing_scale))

    def experts(self, h, layer, addresses, jobs, out):
        layout, config, biases = layer
        top_k = len(out) // len(h)
        for i in range(len(jobs.experts)):
            gate, up, down = (
                NaiveMatrix(at_address(a, t.nbytes), t.format, t.shape, bias)
                for a, t, bias in zip(
                    addresses[i],
                    layout,
                    [None] * 3 if biases is None else [b[jobs.experts[i]] for b in biases],
                    strict=True,
                )
            )
            pairs = jobs.pairs[jobs.starts[i] : jobs.starts[i + 1]]
            rows = h[pairs // top_k]
            out[pairs] = down(gated(gate(rows), up(rows), config))

    def hidden_states(self, num_tokens):
        return np.empty((num_tokens, self.hidden_size), np.float32)

    def pair_outputs(self, num_pairs):
        return np.empty((num_pairs, self.hidden_size), np.float32)

    def weighted(self, h, weights):
        return (h[:, None] * weights[..., None]).reshape(-1, h.shape[1])

    def combine(self, x, out, weights):
        x += (out.reshape(*weights.shape, -1) * weights[..., None]).sum(1)

    def feed_forward(self, x, h, layer, into=None):
        w, config, norm = layer
        if h is None:
            h = rms_norm(x, norm, config.norm_eps)
        y = w.down(gated(w.gate(h), w.up(h), config))
        target = x if into is None else into
        target += y if w.scale is None else y * sigmoid(w.scale(h))

    def branches(self, x):
        return np.zeros_like(x), np.zeros_like(x)

    def merge(self, x, dense, routed, layer):
        w, config = layer
        dense, routed = (
            rms_norm(y, norm, config.norm_eps)
            for y, norm in ((dense, w.dense_norm), (routed, w.routed_norm))
        )
        x[:] = (x + rms_norm(dense + routed, w.norm, config.norm_eps)) * np.float32(w.scale)

    def output_layer(self, norm, head, config):
        return norm, head, config

    def head(self, x, rows, layer):
        norm, head, config = layer
        logits, cap = head(norm_of(x[rows], norm, config.norm_eps)), config.logit_softcap
        return cap * np.tanh(logits / cap) if cap else logits

    def close(self):
        pass
