"""Bytes per second of whole layers in decode: a token's experts in one call, and attention over a
long text, beside this machine's read bandwidth."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import median
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np

from tiered.backend import AttentionWeights, Backend, Batch, open_cpu
from tiered.config import EngineConfig, ModelConfig
from tiered.experts import expert_layout
from tiered.kv_cache import PAGE_SIZE, layer_bytes
from tiered.measuring.measure import LARGER_THAN_CACHES, expert_bench
from tiered.measuring.peers import Progress

FORMATS = "q4_0", "q4_k"
CONTEXTS = 8192, 32768  # tokens before the one that is decoded
REPEATS = 7
HIDDEN = 64  # of the layers whose attention is measured


class Experts(NamedTuple):
    model: str
    expert_size: int
    hidden_size: int
    top_k: int


class Heads(NamedTuple):
    model: str
    num_heads: int
    num_kv_heads: int
    head_dim: int


EXPERTS = Experts("Qwen3-30B-A3B", 768, 2048, 8), Experts("Mixtral 8x7B", 14336, 4096, 2)
HEADS = Heads("Qwen3-30B-A3B", 32, 4, 128), Heads("Mixtral 8x7B", 32, 8, 128)


def layer_rates(threads: int, bandwidth: float, progress: Progress) -> Iterator[dict[str, Any]]:
    """One measurement after the other; `bandwidth`: of reads by so many threads, bytes/s."""
    total = len(EXPERTS) * len(FORMATS) + len(HEADS) * 2
    done = 0
    for experts in EXPERTS:
        for format in FORMATS:
            progress(f"experts of {experts.model}, {format}", done, total)
            done += 1
            rate = expert_rate(experts, format, threads)
            yield _row("experts", experts.model, format, threads, rate, bandwidth)
    for heads in HEADS:
        for dtype in ("f16", "int8"):
            progress(f"attention of {heads.model}, {dtype}", done, total)
            done += 1
            for length in CONTEXTS:
                rate = attention_rate(heads, dtype, length, threads)
                row = _row("attention", heads.model, dtype, threads, rate, bandwidth)
                yield {**row, "context": length}


def _row(
    kernel: str, model: str, format: str, threads: int, rate: float, bandwidth: float
) -> dict[str, Any]:
    return {
        "kernel": kernel, "model": model, "format": format, "threads": threads,
        "gb_s": rate / 1e9, "of_bandwidth": rate / bandwidth,
    }  # fmt: skip


def expert_rate(experts: Experts, format: str, threads: int) -> float:
    """Bytes/s of the weights of a token's experts, other ones each time."""
    layout = expert_layout(experts.hidden_size, experts.expert_size, format, format, format)
    with expert_bench(layout, experts.hidden_size, experts.expert_size, threads) as bench:
        return experts.top_k * layout.nbytes / bench.seconds(1, experts.top_k)


def attention_rate(heads: Heads, dtype: str, length: int, threads: int) -> float:
    """Bytes/s of the keys and values that one token looks at."""
    backend = open_cpu(EngineConfig(threads=threads))
    try:
        return _attention_rate(backend, heads, dtype, length)
    finally:
        backend.close()


def _attention_rate(backend: Backend, heads: Heads, dtype: str, length: int) -> float:
    """Layers in turn, so many that caches do not help, with projections that take no time."""
    nbytes = layer_bytes(_config(heads, 1, length), 0, length, dtype)
    config = _config(heads, max(2, -(-LARGER_THAN_CACHES // nbytes)), length)
    q_size, kv_size = (count * heads.head_dim for count in (heads.num_heads, heads.num_kv_heads))
    q, k, v, o = (
        backend.matrix(np.zeros(4 * rows * columns, np.uint8), "f32", (rows, columns))
        for rows, columns in (
            (q_size, HIDDEN),
            (kv_size, HIDDEN),
            (kv_size, HIDDEN),
            (HIDDEN, q_size),
        )
    )
    weights = AttentionWeights(np.ones(HIDDEN, np.float32), q, k, v, o)
    layers = [backend.attention_layer(weights, config, i) for i in range(config.num_layers)]
    num_pages = -(-(length + 1) // PAGE_SIZE)
    kv = backend.kv_pages(config, num_pages, PAGE_SIZE, dtype)
    for arrays in kv.arrays.values():
        for array in arrays.values():
            array[...] = 1  # memory that nobody has written to is not read from anywhere
    batch = Batch(
        np.zeros(1, np.int32), np.array([length], np.int32), np.zeros(1, np.int32),
        np.arange(num_pages, dtype=np.int32)[None],
    )  # fmt: skip
    x, times = np.ones((1, HIDDEN), np.float32), []
    for _ in range(REPEATS):
        start = perf_counter()
        for index, layer in enumerate(layers):
            backend.attention(x, layer, kv, index, batch)
        times.append(perf_counter() - start)
    return nbytes * config.num_layers / median(times[1:])


def _config(heads: Heads, num_layers: int, length: int) -> ModelConfig:
    return ModelConfig(
        "bench", num_layers=num_layers, hidden_size=HIDDEN, vocab_size=1,
        context_length=length + PAGE_SIZE, num_heads=heads.num_heads,
        num_kv_heads=heads.num_kv_heads, head_dim=heads.head_dim, norm_eps=1e-6,
    )  # fmt: skip
