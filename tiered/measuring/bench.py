"""Speed of a whole model, beside what this machine's memory could give."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any, NamedTuple

import numpy as np

from tiered.engine import Engine
from tiered.stats import EngineStats
from tiered.version import __version__
from tiered.weights.dense import dense_bytes, dense_format, matrix_bytes


def weights_per_token(engine: Engine, dropped: float = 0.0) -> float:
    """Bytes of weights that one decoded token reads: dense ones and top_k experts a layer, but for
    the share that rules drop."""
    config, store = engine.config, engine.store
    dense = dense_bytes(engine.checkpoint, engine.choices.quantize)
    if "head" in engine.checkpoint.tensors:  # else the embedding is the head, and is read whole
        embedding = engine.checkpoint.tensors["embed"]
        dense -= matrix_bytes(dense_format(embedding, engine.choices.quantize), embedding.shape)
    experts = config.top_k * sum(store.layer_bytes) / config.num_experts if store else 0
    return dense + (1 - dropped) * experts


class Speed(NamedTuple):
    """Medians over runs, and what was counted in all of them."""

    prefill_tok_s: float
    decode_tok_s: float
    first_token: float  # seconds
    stats: EngineStats


def measure_speed(
    engine: Engine, prompt: Sequence[int], answer: Sequence[int], runs: int = 1
) -> Speed:
    """Prefill `prompt` and decode `answer`, after a short warm-up, so many times."""
    engine.score_tokens(prompt[:16], answer[:1])
    before = engine.stats
    each: list[EngineStats] = []
    for _ in range(runs):
        earlier = engine.stats
        engine.score_tokens(prompt, answer)
        each.append(engine.stats - earlier)
    return Speed(
        median(run.prefill_tok_s for run in each),
        median(run.decode_tok_s for run in each),
        median(run.prefill_seconds for run in each),
        engine.stats - before,
    )


def bench_model(engine: Engine, prefill: int, decode: int, runs: int = 1) -> dict[str, Any]:
    """Prefill and decode speed on seeded random tokens, after a short warm-up.

    Decoding is fed random tokens, too: a model with random weights would soon repeat itself, and
    need the same few experts again and again.
    """
    from cpu_kernels.bandwidth import read_bandwidth

    rng = np.random.default_rng(0)
    prompt = rng.integers(0, engine.config.vocab_size, prefill).tolist()
    answer = rng.integers(0, engine.config.vocab_size, decode - 1).tolist()
    speed = measure_speed(engine, prompt, answer, runs)
    stats = speed.stats
    threads = engine.backend.num_threads
    bandwidth = read_bandwidth(threads)
    per_token = weights_per_token(engine, stats.dropped_share)
    steps = (stats.new_tokens - runs) * engine.config.num_layers
    return {
        "tiered": __version__,
        "model": str(engine.checkpoint.path),
        "threads": threads,
        "isa": engine.backend.isa,
        "prefill": prefill,
        "decode": decode,
        "runs": runs,
        "prefill_tok_s": speed.prefill_tok_s,
        "decode_tok_s": speed.decode_tok_s,
        "time_to_first_token": speed.first_token,
        "weights_gb_per_token": per_token / 1e9,
        "decode_gb_s": per_token * speed.decode_tok_s / 1e9,
        "bandwidth_gb_s": bandwidth / 1e9,
        "of_bandwidth": per_token * speed.decode_tok_s / bandwidth,
        "python_us_per_layer": 1e6 * stats.decode_python / max(1, steps),
        "hit_rate": stats.hit_rate,
        "misses": stats.misses,
        "dropped": stats.dropped_share,
        "dropped_weight": stats.dropped_weight_share,
        "skipped_experts": stats.skipped_experts,
        "skipped_weight": stats.skipped_weight,
        "routed_weight": stats.routed_weight,
        "copied_experts": stats.copied_experts,
        "copied_weight": stats.copied_weight,
        "computed_weight": stats.computed_weight,
        "bytes_per_token": stats.bytes_read / (stats.new_tokens or 1),
        "seconds": stats.parts,
        "expert_slots_bytes": engine.plan.slots,
        "mapped": engine.plan.mapped,
        **engine.gpu_facts(),
        **({"simulated": simulated_speed(engine, stats, runs)} if engine.timing.label else {}),
    }


def simulated_speed(engine: Engine, stats: EngineStats, runs: int) -> dict[str, Any]:
    """What a described card would have reached meanwhile: nothing of it is measured."""
    source: Any = engine.decoder.source  # of the cards
    asked = source.hits + source.copies + source.computed_in_ram if source else 0
    return {
        "card": engine.timing.label,
        "prefill_tok_s": stats.prompt_tokens / stats.simulated_prefill_seconds,
        "decode_tok_s": (stats.new_tokens - runs) / stats.simulated_decode_seconds,
        "on_card": source.hits / max(1, asked) if source else 1.0,
    }
