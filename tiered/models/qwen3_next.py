"""Qwen3-Next: three layers of gated DeltaNet for each one of gated attention, many small experts,
and a gated one that every token uses. https://qwen.ai/blog?id=qwen3-next"""

from tiered.checkpoints.facts import Facts
from tiered.checkpoints.gguf_config import gguf_common, gguf_delta, gguf_experts
from tiered.checkpoints.hf_config import (
    hf_common,
    hf_delta,
    hf_dense_layers,
    hf_experts,
    hf_quarter_rope,
)
from tiered.checkpoints.tensor_names import (
    GGUF,
    GGUF_DELTA,
    HF_BASE,
    HF_DELTA,
    HF_DENSE,
    HF_EXPERTS,
    HF_SHARED,
)
from tiered.config import ModelConfig

GGUF_ARCHITECTURE = "qwen3next"
HAS_EXPERTS = True
LAYERS = {**HF_BASE, **HF_DENSE, **HF_EXPERTS, **HF_SHARED}
HF_NAMES = {
    **LAYERS,
    **HF_DELTA,
    **{
        name.replace("model.", "mtp.", 1): canonical.replace("layers.", "drafts.", 1)
        for name, canonical in LAYERS.items()
        if name.startswith("model.layers.")
    },
    "mtp.pre_fc_norm_embedding.weight": "drafts.0.mtp.embedding_norm",
    "mtp.pre_fc_norm_hidden.weight": "drafts.0.mtp.hidden_norm",
    "mtp.fc.weight": "drafts.0.mtp.projection",
    "mtp.norm.weight": "drafts.0.mtp.norm",
}
GGUF_NAMES = {**GGUF, **GGUF_DELTA}


def from_hf(facts: Facts) -> ModelConfig:
    return ModelConfig(
        model_type="qwen3_next",
        expert_size=facts.integer("moe_intermediate_size"),
        shared_expert_size=facts.integer("shared_expert_intermediate_size"),
        ffn_size=facts.integer("intermediate_size", default=0),
        dense_layers=hf_dense_layers(facts),
        normalize_top_k=facts.flag("norm_topk_prob", default=True),
        **hf_quarter_rope(facts, hf_common(facts)),
        **hf_experts(facts),
        **hf_delta(facts),
    )


def from_gguf(facts: Facts) -> ModelConfig:
    size = facts.integer("expert_feed_forward_length")
    return ModelConfig(
        model_type="qwen3_next",
        expert_size=size,
        shared_expert_size=facts.integer("expert_shared_feed_forward_length", default=size),
        **gguf_common(facts, pairs="half"),
        **gguf_experts(facts, normalize_top_k=True),
        **gguf_delta(facts, is_tiled=False),
    )
