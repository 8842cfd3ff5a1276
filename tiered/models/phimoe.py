"""Phi-3.5-MoE: Mixtral's layers with LayerNorm and biases, a SparseMixer for a router, and rotary
embedding by LongRoPE. https://arxiv.org/abs/2404.14219"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tiered.checkpoints.facts import Facts
from tiered.checkpoints.gguf_config import gguf_common, gguf_experts
from tiered.checkpoints.hf_config import hf_common, hf_experts
from tiered.checkpoints.tensor_names import GGUF, Names
from tiered.config import ModelConfig
from tiered.models import mixtral

GGUF_ARCHITECTURE = "phimoe"
HAS_EXPERTS = True
HF_NAMES: Names = {
    **mixtral.HF_NAMES,
    "model.norm.bias": "norm_bias",
    "lm_head.bias": "head_bias",
    "model.layers.{}.input_layernorm.bias": "layers.{}.attention_norm_bias",
    "model.layers.{}.post_attention_layernorm.bias": "layers.{}.ffn_norm_bias",
}
GGUF_NAMES: Names = {
    **GGUF,
    "output_norm.bias": "norm_bias",
    "output.bias": "head_bias",
    "blk.{}.attn_norm.bias": "layers.{}.attention_norm_bias",
    "blk.{}.ffn_norm.bias": "layers.{}.ffn_norm_bias",
}
FIXED: dict[str, Any] = {
    "model_type": "phimoe",
    "layer_norms": True,
    "router_scoring": "sparsemixer",
    "normalize_top_k": False,
}
TOP_K = 2  # what its SparseMixer is made for
JITTER = 0.01


def from_hf(facts: Facts) -> ModelConfig:
    experts = hf_experts(facts)
    if experts["top_k"] != TOP_K:
        raise facts.error("num_experts_per_tok", experts["top_k"], str(TOP_K))
    return ModelConfig(
        **FIXED,
        expert_size=facts.integer("intermediate_size"),
        sliding_window=facts.integer("sliding_window", default=0),
        router_jitter=facts.number("router_jitter_noise", default=JITTER),
        **hf_common(facts, theta=1_000_000.0),
        **experts,
    )


def from_gguf(facts: Facts) -> ModelConfig:
    """The divisors of LongRoPE are tensors there."""
    common, experts = gguf_common(facts, pairs="half"), gguf_experts(facts, normalize_top_k=False)
    if experts["top_k"] != TOP_K:
        raise facts.error("expert_used_count", experts["top_k"], str(TOP_K))
    magnitude = facts.number("rope.scaling.attn_factor", default=1.0)
    common["rope"] = replace(
        common["rope"],
        magnitude=magnitude,
        long_magnitude=magnitude,
        short_context=facts.integer("rope.scaling.original_context_length", default=0),
    )
    return ModelConfig(
        **common,
        **(experts | FIXED),
        expert_size=facts.integer("expert_feed_forward_length", "feed_forward_length"),
        sliding_window=facts.integer("attention.sliding_window", default=0),
        router_jitter=JITTER,
    )
