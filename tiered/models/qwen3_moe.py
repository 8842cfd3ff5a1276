"""Qwen3-MoE: queries and keys are normalized head by head."""

from tiered.checkpoints.facts import Facts
from tiered.checkpoints.gguf_config import gguf_common, gguf_experts
from tiered.checkpoints.hf_config import hf_common, hf_dense_layers, hf_experts
from tiered.checkpoints.tensor_names import GGUF, HF_BASE, HF_DENSE, HF_EXPERTS
from tiered.config import ModelConfig

GGUF_ARCHITECTURE = "qwen3moe"
HAS_EXPERTS = True
HF_NAMES = {**HF_BASE, **HF_DENSE, **HF_EXPERTS}
GGUF_NAMES = GGUF


def from_hf(facts: Facts) -> ModelConfig:
    slides = facts.flag("use_sliding_window", default=False)
    return ModelConfig(
        model_type="qwen3_moe",
        expert_size=facts.integer("moe_intermediate_size"),
        ffn_size=facts.integer("intermediate_size"),
        dense_layers=hf_dense_layers(facts),
        qk_norm="head",
        normalize_top_k=facts.flag("norm_topk_prob", default=False),
        sliding_window=facts.integer("sliding_window", default=0) if slides else 0,
        **hf_common(facts),
        **hf_experts(facts),
    )


def from_gguf(facts: Facts) -> ModelConfig:
    experts = gguf_experts(facts, normalize_top_k=True)
    size = facts.integer("feed_forward_length", default=0)
    return ModelConfig(
        model_type="qwen3_moe",
        expert_size=facts.integer(
            "expert_feed_forward_length", default=size // max(experts["top_k"], 1)
        ),
        ffn_size=size,
        qk_norm="head",
        **gguf_common(facts, pairs="half"),
        **experts,
    )
