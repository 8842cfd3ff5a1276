"""A dense llama-type model run once over texts, in plain NumPy, to see what its layers get."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Executor
from typing import NamedTuple

import numpy as np

from tiered.checkpoints.checkpoint import Checkpoint
from tiered.config import ModelConfig


class DenseLayer(NamedTuple):
    """Weights of a layer and what its feed-forward got for every token of the texts. The arrays
    are good until the next layer is asked for."""

    weights: dict[str, np.ndarray]  # float32, canonical names without "layers.N."
    inputs: np.ndarray  # float32 [num_texts, length, hidden_size], normalized
    activations: np.ndarray  # float32 [num_texts, length, ffn_size]: silu(gate) * up


def run_dense(checkpoint: Checkpoint, texts: np.ndarray, pool: Executor) -> Iterator[DenseLayer]:
    """Each layer in turn, the texts side by side. `texts` are token ids, int [num_texts, length].

    The same bits come out whatever the number of threads, if BLAS itself uses one.
    """
    config = checkpoint.config
    cos, sin = rotation(config, texts.shape[1])
    x = checkpoint.float32("embed")[texts]  # [num_texts, length, hidden_size]
    inputs = np.empty_like(x)
    activations = np.empty((*texts.shape, config.ffn_size), np.float32)
    for index in range(config.num_layers):
        weights = layer_weights(checkpoint, index)

        def forward(text: int, weights: dict[str, np.ndarray] = weights) -> None:
            h = rms_norm(x[text], weights["attention_norm"], config.norm_eps)
            x[text] += attention(h, weights, config, cos, sin)
            h = rms_norm(x[text], weights["ffn_norm"], config.norm_eps)
            inputs[text] = h
            activations[text] = silu(h @ weights["ffn.gate"].T) * (h @ weights["ffn.up"].T)
            x[text] += activations[text] @ weights["ffn.down"].T

        list(pool.map(forward, range(len(texts))))
        yield DenseLayer(weights, inputs, activations)


def layer_weights(checkpoint: Checkpoint, index: int) -> dict[str, np.ndarray]:
    """All tensors of a layer; q and k with the two values that rotate together half a head
    apart, as Hugging Face keeps them."""
    prefix, config = f"layers.{index}.", checkpoint.config
    names = [name for name in checkpoint.tensors if name.startswith(prefix)]
    weights = {name.removeprefix(prefix): checkpoint.float32(name) for name in names}
    if config.rope.pairs == "adjacent":
        for name in ("q", "k"):
            rows = weights[name].reshape(-1, config.head_dim // 2, 2, config.hidden_size)
            weights[name] = rows.swapaxes(1, 2).reshape(-1, config.hidden_size)
    return weights


def attention(
    h: np.ndarray,
    weights: dict[str, np.ndarray],
    config: ModelConfig,
    cos: np.ndarray,
    sin: np.ndarray,
) -> np.ndarray:
    """Causal attention of one text: float32 [length, hidden_size]."""
    length = len(h)
    q, k, v = ((h @ weights[name].T).reshape(length, -1, config.head_dim) for name in "qkv")
    q, k, v = rotate(q, cos, sin), rotate(k, cos, sin), v.swapaxes(0, 1)
    repeats = config.num_heads // config.num_kv_heads
    k, v = k.repeat(repeats, axis=0), v.repeat(repeats, axis=0)  # [num_heads, length, head_dim]
    scores = q @ k.swapaxes(1, 2) / np.sqrt(np.float32(config.head_dim))
    scores += np.triu(np.full((length, length), -np.inf, np.float32), 1)
    scores = np.exp(scores - scores.max(axis=-1, keepdims=True))
    out = scores / scores.sum(axis=-1, keepdims=True) @ v  # [num_heads, length, head_dim]
    result: np.ndarray = out.swapaxes(0, 1).reshape(length, -1) @ weights["o"].T
    return result


def rotation(config: ModelConfig, length: int) -> tuple[np.ndarray, np.ndarray]:
    """cos and sin of every position's angles: float32 [length, head_dim / 2] each."""
    dim = config.rope.dim or config.head_dim
    if dim != config.head_dim or config.rope.inv_freq_scale:
        raise ValueError("only plain rotary embedding over whole heads is supported here")
    frequencies = config.rope.theta ** (-np.arange(0, dim, 2) / dim)
    angles = np.arange(length)[:, None] * frequencies
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def rotate(x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    """[length, heads, head_dim] -> [heads, length, head_dim], rotated by position."""
    a, b = np.split(x.swapaxes(0, 1), 2, axis=-1)
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    scale = 1 / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps)
    result: np.ndarray = x * scale * weight
    return result


def silu(x: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):  # exp of a large number: silu is 0 there
        result: np.ndarray = x / (1 + np.exp(-x))
    return result
