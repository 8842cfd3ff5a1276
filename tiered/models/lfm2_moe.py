"""LFM2 with experts (8B-A1B): most layers have a gated short convolution in the place of attention,
the first ones no experts. https://arxiv.org/abs/2511.23404"""

from __future__ import annotations

from typing import Any

from tiered.checkpoints.facts import Facts
from tiered.checkpoints.gguf_config import gguf_common, gguf_experts, gguf_hybrid
from tiered.checkpoints.hf_config import hf_common, hf_experts
from tiered.checkpoints.tensor_names import GGUF, HF_BASE, Names
from tiered.config import ModelConfig

GGUF_ARCHITECTURE = "lfm2moe"
HAS_EXPERTS = True
WORDS = {"w1": "gate", "w3": "up", "w2": "down"}
HF_NAMES: Names = {
    **HF_BASE,
    "model.embedding_norm.weight": "norm",
    **{
        f"model.layers.{{}}.{stored}": f"layers.{{}}.{name}"
        for stored, name in {
            "operator_norm.weight": "attention_norm",
            "ffn_norm.weight": "ffn_norm",
            "self_attn.out_proj.weight": "o",
            "self_attn.q_layernorm.weight": "q_norm",
            "self_attn.k_layernorm.weight": "k_norm",
            "conv.in_proj.weight": "conv.gates",
            "conv.conv.weight": "conv.conv",
            "conv.out_proj.weight": "conv.o",
            "feed_forward.gate.weight": "router",
            "feed_forward.expert_bias": "router_correction",
            "feed_forward.experts.gate_up_proj": "experts.*.gate|up",
            "feed_forward.experts.down_proj": "experts.*.down",
            **{f"feed_forward.{w}.weight": f"ffn.{name}" for w, name in WORDS.items()},
            **{
                f"feed_forward.experts.{{}}.{w}.weight": f"experts.{{}}.{name}"
                for w, name in WORDS.items()
            },
        }.items()
    },
}
GGUF_NAMES: Names = {
    **GGUF,
    "token_embd_norm.weight": "norm",
    "blk.{}.shortconv.in_proj.weight": "layers.{}.conv.gates",
    "blk.{}.shortconv.conv.weight": "layers.{}.conv.conv",
    "blk.{}.shortconv.out_proj.weight": "layers.{}.conv.o",
}
FIXED: dict[str, Any] = {"model_type": "lfm2_moe", "qk_norm": "head"}


def from_hf(facts: Facts) -> ModelConfig:
    if facts.flag("conv_bias", default=False):
        raise facts.error("conv_bias", True, "false")
    num_layers = facts.integer("num_hidden_layers", maximum=2**16)
    types = facts.find("layer_types")
    known = ["conv", "full_attention"]
    if (
        not isinstance(types, list)
        or len(types) != num_layers
        or any(t not in known for t in types)
    ):
        raise facts.error("layer_types", types, f"{' or '.join(known)} for each layer")
    return ModelConfig(
        **FIXED,
        expert_size=facts.integer("moe_intermediate_size"),
        ffn_size=facts.integer("intermediate_size"),
        dense_layers=frozenset(range(facts.integer("num_dense_layers", maximum=2**16))),
        conv_layers=frozenset(i for i in range(num_layers) if types[i] == "conv"),
        conv_size=facts.integer("conv_L_cache", maximum=64),
        router_scoring="sigmoid",
        normalize_top_k=facts.flag("norm_topk_prob", default=True),
        routing_scale=facts.number("routed_scaling_factor", default=1.0),
        **hf_common(facts, theta=1_000_000.0),
        **hf_experts(facts),
    )


def from_gguf(facts: Facts) -> ModelConfig:
    attending, conv_layers = gguf_hybrid(facts)
    return ModelConfig(
        **FIXED,
        expert_size=facts.integer("expert_feed_forward_length"),
        ffn_size=facts.integer("feed_forward_length"),
        conv_layers=conv_layers,
        conv_size=facts.integer("shortconv.l_cache", maximum=64),
        **gguf_common(attending, pairs="half"),
        **gguf_experts(facts, normalize_top_k=True, scoring="sigmoid"),
    )
