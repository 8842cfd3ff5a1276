"""What GGUF architectures spell alike, as fields of ModelConfig."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from tiered.checkpoints.facts import Facts
from tiered.checkpoints.rope import rope_from_gguf
from tiered.config import DeltaConfig, LatentConfig


def gguf_common(facts: Facts, pairs: str, truncate: bool = True) -> dict[str, Any]:
    """Fields that all architectures have; with latent attention, see `gguf_latent`.

    `truncate`: whether the range in which YaRN blends is rounded to whole pairs of values.
    """
    hidden_size = facts.integer("embedding_length")
    num_heads = facts.integer("attention.head_count")
    head_dim = hidden_size // max(num_heads, 1)
    head_dim = facts.integer("attention.key_length", default=head_dim, maximum=2**16)
    is_latent = "attention.kv_lora_rank" in facts
    if not is_latent and facts.integer("attention.value_length", default=head_dim) != head_dim:
        raise facts.error("attention.value_length", "another", f"{head_dim}, as key_length")
    context_length = facts.integer("context_length")
    tokenizer = Facts(facts.values, facts.source, "tokenizer.ggml.")
    ends = (tokenizer.integers(f"{name}_token_id") for name in ("eos", "eot", "eom"))
    return {
        "num_layers": gguf_num_layers(facts),
        "hidden_size": hidden_size,
        "vocab_size": facts.integer("vocab_size"),
        "context_length": context_length,
        "num_heads": num_heads,
        "num_kv_heads": facts.integer("attention.head_count_kv", default=num_heads),
        "head_dim": head_dim,
        "norm_eps": facts.number("attention.layer_norm_rms_epsilon"),
        "rope": rope_from_gguf(facts, head_dim, context_length, pairs, truncate),
        "eos_ids": tuple(dict.fromkeys(token for ids in ends for token in ids)),
    }


def gguf_num_layers(facts: Facts) -> int:
    """Without the layers that draft tokens, which are counted at the end."""
    count = facts.integer("block_count", maximum=2**16)
    return max(count - facts.integer("nextn_predict_layers", default=0), 0)


def gguf_full_layers(facts: Facts, period: int) -> frozenset[int]:
    """Layers without the sliding window: those that the file says, or every `period`-th."""
    name, num_layers = "attention.sliding_window_pattern", gguf_num_layers(facts)
    slides = facts.find(name, default=period)
    if not isinstance(slides, list):
        period = max(facts.integer(name, default=period, maximum=2**16), 1)
        return frozenset(range(period - 1, num_layers, period))
    if len(slides) < num_layers or any(type(flag) is not bool for flag in slides):
        raise facts.error(name, slides, "a flag for each layer")
    return frozenset(layer for layer in range(num_layers) if not slides[layer])


def gguf_hybrid(facts: Facts) -> tuple[Facts, frozenset[int]]:
    """Facts of the layers with attention, and which have none: those without heads of keys."""
    heads = facts.find("attention.head_count_kv")
    if not isinstance(heads, list) or not any(heads):
        raise facts.error("attention.head_count_kv", heads, "a number for each layer")
    key = facts.prefix + "attention.head_count_kv"
    values = {**facts.values, key: [count for count in heads if count]}
    without = frozenset(layer for layer, count in enumerate(heads) if not count)
    return Facts(values, facts.source, facts.prefix), without


def gguf_experts(facts: Facts, normalize_top_k: bool, scoring: str = "softmax") -> dict[str, Any]:
    """Fields of the router. `scoring` is what the architecture does if the file says nothing."""
    number = facts.integer("expert_gating_func", default=0)
    if number > 2:
        raise facts.error("expert_gating_func", number, "1 (softmax) or 2 (sigmoid)")
    return {
        "router_scoring": (scoring, "softmax", "sigmoid")[number],
        "routing_scale": facts.number("expert_weights_scale", default=0.0) or 1.0,
        "expert_groups": facts.integer("expert_group_count", default=0) or 1,
        "used_groups": facts.integer("expert_group_used_count", default=0) or 1,
        "dense_layers": frozenset(
            range(facts.integer("leading_dense_block_count", default=0, maximum=2**16))
        ),
        "num_experts": facts.integer("expert_count", maximum=2**16),
        "top_k": facts.integer("expert_used_count", maximum=2**16),
        "normalize_top_k": facts.flag("expert_weights_norm", default=normalize_top_k),
    }


def gguf_latent(facts: Facts) -> dict[str, Any]:
    """DeepSeek's multi-head latent attention. What is called key_length is that of the cache in
    newer files, which have the head's as key_length_mla."""
    rope_dim = facts.integer("rope.dimension_count", maximum=2**16)
    names = "attention.key_length_mla", "attention.key_length"
    nope_dim = max(facts.integer(*names, maximum=2**16) - rope_dim, 0)
    names = "attention.value_length_mla", "attention.value_length"
    latent = LatentConfig(
        kv_rank=facts.integer("attention.kv_lora_rank", maximum=2**16),
        q_rank=facts.integer("attention.q_lora_rank", default=0, maximum=2**16),
        nope_dim=nope_dim,
        rope_dim=rope_dim,
        value_dim=facts.integer(*names, maximum=2**16),
    )
    rope = rope_from_gguf(facts, rope_dim, facts.integer("context_length"), "adjacent")
    # The magnitude that YaRN gives the rotated values is given to all scores instead.
    factor = max(facts.number("rope.scaling.factor", default=1.0), 1.0)
    slope = facts.number("rope.scaling.yarn_log_multiplier", default=0.0)
    magnitude = 1 + slope * math.log(factor) if rope.inv_freq_scale else 1.0
    return {
        "latent": latent,
        "head_dim": latent.kv_rank + rope_dim,
        "num_kv_heads": 1,
        "rope": replace(rope, magnitude=1.0),
        "query_scale": max(nope_dim + rope_dim, 1) ** -0.5 * magnitude**2,
    }


def gguf_delta(facts: Facts, is_tiled: bool) -> dict[str, Any]:
    """Qwen's gated DeltaNet, and which layers have attention instead. Norms are stored as they are
    applied."""
    num_layers = gguf_num_layers(facts)
    interval = max(facts.integer("full_attention_interval", default=4), 1)
    heads = facts.integer("ssm.time_step_rank", maximum=2**16)
    inner = facts.integer("ssm.inner_size")
    return {
        "delta": DeltaConfig(
            num_key_heads=facts.integer("ssm.group_count", maximum=2**16),
            num_value_heads=heads,
            key_dim=facts.integer("ssm.state_size", maximum=2**16),
            value_dim=inner // max(heads, 1),
            conv_size=facts.integer("ssm.conv_kernel", maximum=64),
            is_tiled=is_tiled,
        ),
        "delta_layers": frozenset(n for n in range(num_layers) if (n + 1) % interval),
        "gated_attention": True,
        "qk_norm": "head",
    }
