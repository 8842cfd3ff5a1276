"""Hy3 (Hunyuan 3): Qwen3's attention, the first layer dense, experts scored by sigmoids, their
choice corrected, and one that every token uses. https://huggingface.co/tencent/Hy3-preview"""

from tiered.checkpoints.facts import Facts
from tiered.checkpoints.gguf_config import gguf_common, gguf_experts
from tiered.checkpoints.hf_config import hf_common, hf_experts, hf_leading_dense_layers
from tiered.checkpoints.tensor_names import (
    GGUF,
    HF_BASE,
    HF_DENSE,
    HF_DRAFTS,
    HF_EXPERTS,
    PROJECTIONS,
)
from tiered.config import ModelConfig

GGUF_ARCHITECTURE = "hy_v3"
HAS_EXPERTS = True
LAYER = "model.layers.{}."
HF_NAMES = {
    **HF_BASE,
    **HF_DENSE,
    **HF_EXPERTS,
    **HF_DRAFTS,
    LAYER + "final_layernorm.weight": "layers.{}.mtp.norm",
    LAYER + "mlp.router.gate.weight": "layers.{}.router",
    LAYER + "mlp.expert_bias": "layers.{}.router_correction",
    **{
        f"{LAYER}mlp.shared_mlp.{name}_proj.weight": f"layers.{{}}.shared.{name}"
        for name in PROJECTIONS
    },
}
GGUF_NAMES = {**GGUF, "blk.{}.exp_probs_b": "layers.{}.router_correction"}


def from_hf(facts: Facts) -> ModelConfig:
    if facts.flag("mlp_bias", default=False):
        raise facts.error("mlp_bias", True, "false")
    size = facts.integer("moe_intermediate_size")
    return ModelConfig(
        model_type="hy_v3",
        expert_size=size,
        shared_expert_size=size * facts.integer("num_shared_experts", default=1),
        ffn_size=facts.integer("intermediate_size"),
        dense_layers=hf_leading_dense_layers(facts, default=1),
        qk_norm="head",
        router_scoring="sigmoid",
        normalize_top_k=facts.flag("route_norm", default=True),
        routing_scale=facts.number("router_scaling_factor", default=1.0),
        **hf_common(facts, theta=11_158_840.0),
        **hf_experts(facts),
    )


def from_gguf(facts: Facts) -> ModelConfig:
    size = facts.integer("expert_feed_forward_length")
    shared = size * facts.integer("expert_shared_count", default=1)
    return ModelConfig(
        model_type="hy_v3",
        expert_size=size,
        shared_expert_size=facts.integer("expert_shared_feed_forward_length", default=shared),
        ffn_size=facts.integer("feed_forward_length"),
        qk_norm="head",
        **gguf_common(facts, pairs="half"),
        **gguf_experts(facts, normalize_top_k=True, scoring="sigmoid"),
    )
