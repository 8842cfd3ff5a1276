"""Gemma 4 with experts (26B-A4B): they run beside a dense feed-forward, norms stand before and
after everything, and every sixth layer sees the whole text with larger heads, whose values are its
keys."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tiered.checkpoints.facts import Facts
from tiered.checkpoints.gguf_config import gguf_common, gguf_experts, gguf_full_layers
from tiered.checkpoints.hf_config import hf_by_attention, hf_common, hf_full_layers, hf_text_part
from tiered.checkpoints.rope import rope_from_hf
from tiered.checkpoints.tensor_names import GGUF, HF_BASE, PROJECTIONS, Names, with_text_part
from tiered.config import AttentionShape, ModelConfig

GGUF_ARCHITECTURE = "gemma4"
HAS_EXPERTS = True
HF_NAMES: Names = with_text_part(
    {
        **HF_BASE,
        **{
            f"model.layers.{{}}.{stored}": f"layers.{{}}.{name}"
            for stored, name in {
                "post_attention_layernorm.weight": "attention_out_norm",
                "pre_feedforward_layernorm.weight": "shared.norm",
                "post_feedforward_layernorm_1.weight": "shared.out_norm",
                "pre_feedforward_layernorm_2.weight": "ffn_norm",
                "post_feedforward_layernorm_2.weight": "experts_out_norm",
                "post_feedforward_layernorm.weight": "ffn_out_norm",
                "layer_scalar": "scale",
                "router.proj.weight": "router",
                "router.scale": "router_norm",
                "router.per_expert_scale": "router_scales",
                "experts.gate_up_proj": "experts.*.gate|up",
                "experts.down_proj": "experts.*.down",
                **{f"mlp.{name}_proj.weight": f"shared.{name}" for name in PROJECTIONS},
            }.items()
        },
    }
)
GGUF_NAMES: Names = {
    **GGUF,
    **{
        f"blk.{{}}.{stored}": f"layers.{{}}.{name}"
        for stored, name in {
            "post_attention_norm.weight": "attention_out_norm",
            "ffn_norm.weight": "shared.norm",
            "post_ffw_norm_1.weight": "shared.out_norm",
            "pre_ffw_norm_2.weight": "ffn_norm",
            "post_ffw_norm_2.weight": "experts_out_norm",
            "post_ffw_norm.weight": "ffn_out_norm",
            "layer_output_scale.weight": "scale",
            "ffn_gate_inp.scale": "router_norm",
            "ffn_down_exps.scale": "router_scales",
            **{f"ffn_{name}.weight": f"shared.{name}" for name in PROJECTIONS},
        }.items()
    },
}
FIXED: dict[str, Any] = {
    "model_type": "gemma4",
    "qk_norm": "head",
    "value_norm": True,
    "output_norms": True,
    "expert_scales": True,
    "query_scale": 1.0,
    "activation": "gelu_tanh",
}


def from_hf(facts: Facts) -> ModelConfig:
    """Of a config.json that describes images and sounds, too, the text part is read."""
    facts = hf_text_part(facts)
    if not facts.flag("enable_moe_block", default=False):
        raise facts.error("enable_moe_block", False, "true: only Gemma 4 with experts is supported")
    for name in ("hidden_size_per_layer_input", "num_kv_shared_layers"):
        if facts.integer(name, default=0):
            raise facts.error(name, facts.integer(name), "0 (or absent)")
    if (activation := facts.text("hidden_activation")) != "gelu_pytorch_tanh":
        raise facts.error("hidden_activation", activation, "'gelu_pytorch_tanh'")
    sliding, full = hf_by_attention(facts)
    common, full_layers = hf_common(sliding), hf_full_layers(facts, period=6)
    other = _other_layers(facts, full_layers)
    head_dim = other.integer("head_dim", default=common["head_dim"], maximum=2**16)
    return ModelConfig(
        **FIXED,
        num_experts=facts.integer("num_experts", maximum=2**16),
        top_k=facts.integer("top_k_experts", maximum=2**16),
        expert_size=facts.integer("moe_intermediate_size"),
        shared_expert_size=facts.integer("intermediate_size"),
        sliding_window=facts.integer("sliding_window"),
        full_layers=full_layers,
        full_shape=AttentionShape(
            other.integer("num_key_value_heads", default=common["num_kv_heads"]),
            head_dim,
            rope_from_hf(full, head_dim, common["context_length"], 1_000_000.0),
        ),
        embedding_scale=common["hidden_size"] ** 0.5,
        logit_softcap=facts.number("final_logit_softcapping", default=0.0),
        **common,
    )


def _other_layers(facts: Facts, full_layers: frozenset[int]) -> Facts:
    """What layers that see the whole text have otherwise; newer files say it layer by layer."""
    if "per_layer_config" not in facts:
        values = {
            "head_dim": facts.find("global_head_dim", default=512),
            "num_key_value_heads": facts.find("num_global_key_value_heads", default=None),
        }
        return Facts(values, facts.source)
    by_layer = facts.mapping("per_layer_config")
    found = [by_layer.get(str(layer), {}) for layer in sorted(full_layers)]
    if set(by_layer) - {str(layer) for layer in full_layers} or any(f != found[0] for f in found):
        raise facts.error("per_layer_config", by_layer, "one shape for all full_attention layers")
    return Facts(found[0] if found else {}, facts.source)


def from_gguf(facts: Facts) -> ModelConfig:
    prefix = facts.prefix
    full_layers = gguf_full_layers(facts, period=6)
    num_layers = facts.integer("block_count", maximum=2**16)
    heads = facts.find("attention.head_count_kv")
    heads = heads if isinstance(heads, list) else [heads] * num_layers
    if len(heads) != num_layers or not 0 < len(full_layers) < num_layers:
        raise facts.error("attention.head_count_kv", heads, "a number for each layer, of two kinds")
    by_kind = {kind: [h for i, h in enumerate(heads) if (i in full_layers) is kind]
               for kind in (False, True)}  # fmt: skip
    changed = {
        "attention.key_length": facts.integer("attention.key_length_swa"),
        "attention.value_length": facts.integer("attention.value_length_swa"),
        "attention.head_count_kv": by_kind[False],
        "rope.freq_base": facts.number("rope.freq_base_swa", default=10_000.0),
        "rope.dimension_count": facts.find("rope.dimension_count_swa", default=None),
    }
    values = {**facts.values, **{prefix + name: value for name, value in changed.items()}}
    full = Facts({**facts.values, prefix + "attention.head_count_kv": by_kind[True]},
                 facts.source, prefix)  # fmt: skip
    whole, common = (
        gguf_common(full, pairs="half"),
        gguf_common(Facts(values, facts.source, prefix), pairs="half"),
    )
    shape = AttentionShape(whole["num_kv_heads"], whole["head_dim"], whole["rope"])
    return ModelConfig(
        **FIXED,
        expert_size=facts.integer("expert_feed_forward_length"),
        shared_expert_size=facts.integer("feed_forward_length"),
        sliding_window=facts.integer("attention.sliding_window"),
        full_layers=full_layers,
        full_shape=replace(shape, rope=replace(shape.rope, dim=shape.head_dim)),
        embedding_scale=common["hidden_size"] ** 0.5,
        logit_softcap=facts.number("final_logit_softcapping", default=0.0),
        **common,
        **gguf_experts(facts, normalize_top_k=True),
    )
