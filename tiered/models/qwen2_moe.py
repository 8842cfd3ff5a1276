"""Qwen2-MoE: biases on queries, keys and values, and a gated expert that every token uses."""

from tiered.checkpoints.facts import Facts
from tiered.checkpoints.gguf_config import gguf_common, gguf_experts
from tiered.checkpoints.hf_config import hf_common, hf_dense_layers, hf_experts
from tiered.checkpoints.tensor_names import GGUF, HF_BASE, HF_DENSE, HF_EXPERTS, HF_SHARED
from tiered.config import ModelConfig

GGUF_ARCHITECTURE = "qwen2moe"
HAS_EXPERTS = True
HF_NAMES = {**HF_BASE, **HF_DENSE, **HF_EXPERTS, **HF_SHARED}
GGUF_NAMES = GGUF


def from_hf(facts: Facts) -> ModelConfig:
    if facts.flag("use_sliding_window", default=False):  # mixes two kinds of layers
        raise facts.error("use_sliding_window", True, "false")
    return ModelConfig(
        model_type="qwen2_moe",
        expert_size=facts.integer("moe_intermediate_size"),
        shared_expert_size=facts.integer("shared_expert_intermediate_size"),
        ffn_size=facts.integer("intermediate_size"),
        dense_layers=hf_dense_layers(facts),
        normalize_top_k=facts.flag("norm_topk_prob", default=False),
        **hf_common(facts),
        **hf_experts(facts),
    )


def from_gguf(facts: Facts) -> ModelConfig:
    experts = gguf_experts(facts, normalize_top_k=False)
    size = facts.integer("feed_forward_length", default=0)
    return ModelConfig(
        model_type="qwen2_moe",
        expert_size=facts.integer(
            "expert_feed_forward_length", default=size // max(experts["top_k"], 1)
        ),
        shared_expert_size=facts.integer("expert_shared_feed_forward_length", default=size),
        ffn_size=size,
        **gguf_common(facts, pairs="half"),
        **experts,
    )
