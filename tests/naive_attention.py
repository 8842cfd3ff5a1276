"""Attention in plain float64, one row and one head at a time."""

from __future__ import annotations

import numpy as np


def rms_norm(x, weight, eps):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight


def rope(x, position, config):
    """x: [head_dim] at one position."""
    dim = config.dim or len(x)
    out = np.array(x, np.float64)
    for pair in range(dim // 2):
        angle = position * config.theta ** (-2.0 * pair / dim)
        if config.inv_freq_scale:
            angle = angle / config.inv_freq_scale[pair]
        c, s = np.cos(angle) * config.magnitude, np.sin(angle) * config.magnitude
        i, j = (pair, pair + dim // 2) if config.pairs == "half" else (2 * pair, 2 * pair + 1)
        out[i], out[j] = x[i] * c - x[j] * s, x[j] * c + x[i] * s
    return out


def attend(q, keys, values, sink=None):
    """q: [head_dim], keys and values: [num_positions, head_dim]."""
    scores = keys @ q / np.sqrt(len(q))
    largest = max(scores.max(), -np.inf if sink is None else sink)
    weights = np.exp(scores - largest)
    total = weights.sum() + (0 if sink is None else np.exp(sink - largest))
    return weights @ values / total


class NaiveAttention:
    """One layer, and the keys and values of every sequence so far. Weights are float64 arrays."""

    def __init__(self, weights, config):
        self.w, self.c = weights, config
        self.keys, self.values = {}, {}  # by (sequence, position): [num_kv_heads, head_dim]

    def heads(self, x, which, position):
        w, c = self.w, self.c
        y = w[which] @ rms_norm(x, w["norm"], c.norm_eps) + w.get(which + "_bias", 0)
        norm = w.get(which + "_norm")
        if c.qk_norm == "full" and norm is not None:
            y = rms_norm(y, norm, c.norm_eps)
        if c.clip_qkv:
            y = np.clip(y, -c.clip_qkv, c.clip_qkv)
        y = y.reshape(-1, c.head_dim)
        if c.qk_norm == "head" and norm is not None:
            y = rms_norm(y, norm, c.norm_eps)
        return (
            y
            if which == "v"
            else np.array([rope(head, position, c.attention_shape(0).rope) for head in y])
        )

    def __call__(self, x, positions, sequences):
        """x + attention(norm(x))."""
        w, c = self.w, self.c
        for row, at in enumerate(zip(sequences.tolist(), positions.tolist(), strict=True)):
            self.keys[at] = self.heads(x[row], "k", at[1])
            self.values[at] = self.heads(x[row], "v", at[1])
        out = []
        for row, (sequence, position) in enumerate(zip(sequences, positions, strict=True)):
            window, first = c.window(0), 0
            if window and c.chunked_attention:
                first = int(position) // window * window
            elif window:
                first = max(0, int(position) + 1 - window)
            seen = [(int(sequence), p) for p in range(first, position + 1)]
            keys = np.array([self.keys[at] for at in seen])
            values = np.array([self.values[at] for at in seen])
            q = self.heads(x[row], "q", int(position))
            if c.temperature_step and 0 in c.full_layers:
                q = q * (1 + c.temperature * np.log(1 + (position + 1) // c.temperature_step))
            group = c.num_heads // c.num_kv_heads
            sinks = w.get("sinks", [None] * c.num_heads)
            heads = [
                attend(q[h], keys[:, h // group], values[:, h // group], sinks[h])
                for h in range(c.num_heads)
            ]
            out.append(x[row] + w["o"] @ np.concatenate(heads))
        return np.array(out)
