"""GLM-4.5 and 4.6: the first layers dense, half of each head rotated, experts chosen as DeepSeek-V3
chooses them, and one that every token uses. https://arxiv.org/abs/2508.06471"""

from dataclasses import replace

from tiered.checkpoints.facts import Facts
from tiered.checkpoints.gguf_config import gguf_common, gguf_experts
from tiered.checkpoints.hf_config import (
    hf_common,
    hf_deepseek_router,
    hf_experts,
    hf_leading_dense_layers,
)
from tiered.checkpoints.tensor_names import (
    GGUF,
    HF_BASE,
    HF_DENSE,
    HF_DRAFT_HEAD,
    HF_DRAFTS,
    HF_EXPERTS,
    HF_SHARED_EXPERTS,
)
from tiered.config import ModelConfig

GGUF_ARCHITECTURE = "glm4moe"
HAS_EXPERTS = True
HF_NAMES = {
    **HF_BASE,
    **HF_DENSE,
    **HF_EXPERTS,
    **HF_SHARED_EXPERTS,
    **HF_DRAFTS,
    **HF_DRAFT_HEAD,
    "model.layers.{}.mlp.gate.e_score_correction_bias": "layers.{}.router_correction",
}
GGUF_NAMES = {**GGUF, "blk.{}.post_attention_norm.weight": "layers.{}.ffn_norm"}


def from_hf(facts: Facts) -> ModelConfig:
    size = facts.integer("moe_intermediate_size")
    common = hf_common(facts)
    if "partial_rotary_factor" not in facts and common["rope"].dim == common["head_dim"]:
        common["rope"] = replace(common["rope"], dim=common["head_dim"] // 2)
    return ModelConfig(
        model_type="glm4_moe",
        expert_size=size,
        shared_expert_size=size * facts.integer("n_shared_experts", default=1),
        ffn_size=facts.integer("intermediate_size"),
        dense_layers=hf_leading_dense_layers(facts, default=1),
        qk_norm="head" if facts.flag("use_qk_norm", default=False) else "",
        **common,
        **hf_experts(facts),
        **hf_deepseek_router(facts),
    )


def from_gguf(facts: Facts) -> ModelConfig:
    size = facts.integer("expert_feed_forward_length")
    return ModelConfig(
        model_type="glm4_moe",
        expert_size=size,
        shared_expert_size=size * facts.integer("expert_shared_count", default=1),
        ffn_size=facts.integer("feed_forward_length"),
        qk_norm="head" if facts.flag("attention.has_qk_norm") else "",
        **gguf_common(facts, pairs="half"),
        **gguf_experts(facts, normalize_top_k=True, scoring="sigmoid"),
    )
