"""Speed of a whole model, beside what this machine's memory could give."""

from __future__ import annotations

from statistics import median
from time import perf_counter
from typing import Any

import numpy as np

from tiered.dense import dense_bytes, dense_format, matrix_bytes
from tiered.engine import Engine
from tiered.version import __version__


def weights_per_token(engine: Engine) -> int:
    """Bytes of weights that one decoded token reads: dense ones and top_k experts a layer."""
    config, store = engine.config, engine.store
    dense = dense_bytes(engine.checkpoint, engine.choices.quantize)
    if "head" in engine.checkpoint.tensors:  # else the embedding is the head, and is read whole
        embedding = engine.checkpoint.tensors["embed"]
        dense -= matrix_bytes(dense_format(embedding, engine.choices.quantize), embedding.shape)
    return dense + (config.top_k * sum(store.blob_bytes) if store else 0)


def bench_model(engine: Engine, prefill: int, decode: int, runs: int = 1) -> dict[str, Any]:
    """Prefill and decode speed on seeded random tokens, after a short warm-up."""
    from cpu_kernels.bandwidth import read_bandwidth

    rng = np.random.default_rng(0)
    prompt = rng.integers(0, engine.config.vocab_size, prefill).tolist()
    list(engine.generate_tokens(prompt[:16], 2))
    before = engine.stats
    prefill_rates, decode_rates, first_token = [], [], []
    for _ in range(runs):
        start = perf_counter()
        tokens = engine.generate_tokens(prompt, decode)
        next(tokens)
        first = perf_counter()
        count = sum(1 for _ in tokens)
        end = perf_counter()
        prefill_rates.append(prefill / (first - start))
        decode_rates.append(count / (end - first))
        first_token.append(first - start)
    stats = engine.stats - before
    threads = engine.backend.num_threads
    bandwidth = read_bandwidth(threads)
    per_token = weights_per_token(engine)
    decode_tok_s = median(decode_rates)
    return {
        "tiered": __version__,
        "model": str(engine.checkpoint.path),
        "threads": threads,
        "isa": engine.backend.isa,
        "prefill": prefill,
        "decode": decode,
        "runs": runs,
        "prefill_tok_s": median(prefill_rates),
        "decode_tok_s": decode_tok_s,
        "time_to_first_token": median(first_token),
        "weights_gb_per_token": per_token / 1e9,
        "decode_gb_s": per_token * decode_tok_s / 1e9,
        "bandwidth_gb_s": bandwidth / 1e9,
        "of_bandwidth": per_token * decode_tok_s / bandwidth,
        "hit_rate": stats.hit_rate,
        "misses": stats.misses,
        "bytes_per_token": stats.bytes_read / (stats.new_tokens or 1),
        "seconds": stats.parts,
        "expert_slots_bytes": engine.plan.slots,
        "mapped": engine.plan.mapped,
    }
