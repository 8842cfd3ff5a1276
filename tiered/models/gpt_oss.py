"""gpt-oss: biases everywhere, attention sinks, every other layer with a short window, and experts
whose SwiGLU is clamped and shifted. https://arxiv.org/abs/2508.10925"""

from typing import Any

from tiered.checkpoints.facts import Facts
from tiered.checkpoints.gguf_config import gguf_common, gguf_experts, gguf_full_layers
from tiered.checkpoints.hf_config import hf_common, hf_experts, hf_full_layers
from tiered.checkpoints.tensor_names import GGUF, HF_BASE
from tiered.config import ModelConfig

GGUF_ARCHITECTURE = "gpt-oss"
HAS_EXPERTS = True
LAYER = "model.layers.{}.mlp."
HF_NAMES = {
    **HF_BASE,
    LAYER + "router.weight": "layers.{}.router",
    LAYER + "router.bias": "layers.{}.router_bias",
    LAYER + "experts.gate_up_proj": "layers.{}.experts.*.gate/up^T",
    LAYER + "experts.gate_up_proj_bias": "layers.{}.experts_bias.gate/up",
    LAYER + "experts.down_proj": "layers.{}.experts.*.down^T",
    LAYER + "experts.down_proj_bias": "layers.{}.experts_bias.down",
}
GGUF_NAMES = {**GGUF, "blk.{}.post_attention_norm.weight": "layers.{}.ffn_norm"}
FIXED: dict[str, Any] = {
    "model_type": "gpt_oss",
    "attention_sinks": True,
    "activation": "clamped_silu",
    "expert_biases": True,
}


def from_hf(facts: Facts) -> ModelConfig:
    alpha = facts.number("swiglu_alpha", default=1.702)
    if alpha != 1.702:
        raise facts.error("swiglu_alpha", alpha, "1.702")
    return ModelConfig(
        **FIXED,
        expert_size=facts.integer("intermediate_size"),
        activation_limit=facts.number("swiglu_limit", default=7.0),
        sliding_window=facts.integer("sliding_window", default=0),
        full_layers=hf_full_layers(facts, period=2),
        **hf_common(facts, theta=150_000.0),
        **hf_experts(facts),
    )


def from_gguf(facts: Facts) -> ModelConfig:
    return ModelConfig(
        **FIXED,
        expert_size=facts.integer("expert_feed_forward_length"),
        activation_limit=7.0,
        sliding_window=facts.integer("attention.sliding_window", default=0),
        full_layers=gguf_full_layers(facts, period=2),
        # As the model was trained; llama.cpp rounds the range, and differs a little.
        **gguf_common(facts, pairs="half", truncate=False),
        **gguf_experts(facts, normalize_top_k=True),
    )
