"""DeepSeek-V2 and V2-Lite: latent attention, shared experts, the first layers dense, scores by
softmax. GGUF gives V3 and GLM-4.7-Flash the same name. https://arxiv.org/abs/2405.04434"""

from tiered.checkpoints.facts import Facts
from tiered.checkpoints.gguf_config import gguf_common, gguf_experts, gguf_latent
from tiered.checkpoints.hf_config import (
    hf_common,
    hf_experts,
    hf_latent,
    hf_leading_dense_layers,
)
from tiered.checkpoints.tensor_names import (
    GGUF,
    HF_BASE,
    HF_DENSE,
    HF_EXPERTS,
    HF_SHARED_EXPERTS,
)
from tiered.config import ModelConfig

GGUF_ARCHITECTURE = "deepseek2"
HAS_EXPERTS = True
HF_NAMES = {**HF_BASE, **HF_DENSE, **HF_EXPERTS, **HF_SHARED_EXPERTS}
GGUF_NAMES = GGUF


def from_hf(facts: Facts) -> ModelConfig:
    size = facts.integer("moe_intermediate_size")
    by_groups = facts.text("topk_method", default="greedy") == "group_limited_greedy"
    return ModelConfig(
        model_type="deepseek_v2",
        expert_size=size,
        shared_expert_size=size * facts.integer("n_shared_experts", default=0),
        ffn_size=facts.integer("intermediate_size"),
        dense_layers=hf_leading_dense_layers(facts, default=0),
        normalize_top_k=False,
        routing_scale=facts.number("routed_scaling_factor", default=1.0),
        expert_groups=facts.integer("n_group", default=1) if by_groups else 1,
        used_groups=facts.integer("topk_group", default=1) if by_groups else 1,
        **(hf_common(facts) | hf_latent(facts)),
        **hf_experts(facts),
    )


def from_gguf(facts: Facts) -> ModelConfig:
    size = facts.integer("expert_feed_forward_length")
    return ModelConfig(
        model_type="deepseek_v2",
        expert_size=size,
        shared_expert_size=size * facts.integer("expert_shared_count", default=0),
        ffn_size=facts.integer("feed_forward_length"),
        **(gguf_common(facts, pairs="adjacent") | gguf_latent(facts)),
        **gguf_experts(facts, normalize_top_k=False),
    )
