"""Mellum 2: Qwen3-MoE's layers; most of them have a sliding window, and those that see the whole
text another rotary embedding. https://arxiv.org/abs/2605.31268"""

from __future__ import annotations

from typing import Any

from tiered.checkpoints.facts import Facts
from tiered.checkpoints.gguf_config import gguf_common, gguf_experts, gguf_full_layers
from tiered.checkpoints.hf_config import (
    hf_by_attention,
    hf_common,
    hf_experts,
    hf_full_layers,
    hf_leading_dense_layers,
)
from tiered.config import AttentionShape, ModelConfig
from tiered.models import qwen3_moe

GGUF_ARCHITECTURE = "mellum"
HAS_EXPERTS = True
HF_NAMES = qwen3_moe.HF_NAMES
GGUF_NAMES = qwen3_moe.GGUF_NAMES


def from_hf(facts: Facts) -> ModelConfig:
    sliding, full = hf_by_attention(facts)
    return ModelConfig(
        model_type="mellum",
        expert_size=facts.integer("moe_intermediate_size"),
        ffn_size=facts.integer("intermediate_size"),
        dense_layers=hf_leading_dense_layers(facts, default=0),
        normalize_top_k=facts.flag("norm_topk_prob", default=True),
        full_layers=hf_full_layers(facts, period=1),
        **_two_kinds(hf_common(sliding), hf_common(full), facts.integer("sliding_window")),
        **hf_experts(facts),
    )


def from_gguf(facts: Facts) -> ModelConfig:
    """Only layers that see the whole text have YaRN."""
    theta = facts.number("rope.freq_base", default=10_000.0)
    changed = {
        "rope.freq_base": facts.number("rope.freq_base_swa", default=theta),
        "rope.scaling.type": "none",
    }
    values = {facts.prefix + name: value for name, value in changed.items()}
    sliding = Facts({**facts.values, **values}, facts.source, facts.prefix)
    return ModelConfig(
        model_type="mellum",
        expert_size=facts.integer("expert_feed_forward_length"),
        full_layers=gguf_full_layers(facts, period=4),
        **_two_kinds(
            gguf_common(sliding, pairs="half"),
            gguf_common(facts, pairs="half"),
            facts.integer("attention.sliding_window"),
        ),
        **gguf_experts(facts, normalize_top_k=True),
    )


def _two_kinds(sliding: dict[str, Any], full: dict[str, Any], window: int) -> dict[str, Any]:
    shape = AttentionShape(full["num_kv_heads"], full["head_dim"], full["rope"])
    return sliding | {"sliding_window": window, "full_shape": shape, "qk_norm": "head"}
