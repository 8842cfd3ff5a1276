"""OLMoE: queries and keys are normalized over all heads together, and may be clipped."""

from tiered.checkpoints.facts import Facts
from tiered.checkpoints.gguf_config import gguf_common, gguf_experts
from tiered.checkpoints.hf_config import hf_common, hf_experts
from tiered.checkpoints.tensor_names import GGUF, HF_BASE, HF_EXPERTS
from tiered.config import ModelConfig

GGUF_ARCHITECTURE = "olmoe"
HAS_EXPERTS = True
HF_NAMES = {**HF_BASE, **HF_EXPERTS}
GGUF_NAMES = GGUF


def from_hf(facts: Facts) -> ModelConfig:
    return ModelConfig(
        model_type="olmoe",
        expert_size=facts.integer("intermediate_size"),
        qk_norm="full",
        clip_qkv=facts.number("clip_qkv", default=0.0),
        normalize_top_k=facts.flag("norm_topk_prob", default=False),
        **hf_common(facts),
        **hf_experts(facts),
    )


def from_gguf(facts: Facts) -> ModelConfig:
    size = facts.integer("feed_forward_length")
    return ModelConfig(
        model_type="olmoe",
        expert_size=facts.integer("expert_feed_forward_length", default=size),
        qk_norm="full",
        clip_qkv=facts.number("attention.clamp_kqv", default=0.0),
        **gguf_common(facts, pairs="half"),
        **gguf_experts(facts, normalize_top_k=False),
    )
