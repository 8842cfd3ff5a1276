"""What config.json files spell alike, as fields of ModelConfig."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tiered.checkpoints.facts import Facts
from tiered.checkpoints.rope import rope_from_hf, score_magnitude_from_hf
from tiered.config import DeltaConfig, LatentConfig


def hf_common(facts: Facts, theta: float = 10_000.0, pairs: str = "half") -> dict[str, Any]:
    """Fields of ModelConfig that all config.json files spell alike."""
    activation = facts.text("hidden_act", default="silu")
    if activation not in ("silu", "swish"):
        raise facts.error("hidden_act", activation, "silu")
    hidden_size = facts.integer("hidden_size")
    num_heads = facts.integer("num_attention_heads")
    head_dim = hidden_size // max(num_heads, 1)
    head_dim = facts.integer("head_dim", default=head_dim, maximum=2**16)
    context_length = facts.integer("max_position_embeddings")
    return {
        "num_layers": facts.integer("num_hidden_layers", maximum=2**16),
        "hidden_size": hidden_size,
        "vocab_size": facts.integer("vocab_size"),
        "context_length": context_length,
        "num_heads": num_heads,
        "num_kv_heads": facts.integer("num_key_value_heads", default=num_heads),
        "head_dim": head_dim,
        "norm_eps": facts.number("rms_norm_eps", "norm_eps"),
        "rope": replace(rope_from_hf(facts, head_dim, context_length, theta), pairs=pairs),
        "eos_ids": facts.integers("eos_token_id"),
    }


def hf_text_part(facts: Facts) -> Facts:
    """What is said of the text, where a config.json describes images or sounds, too."""
    if "text_config" not in facts:
        return facts
    text = Facts(facts.mapping("text_config"), facts.source)
    ends = facts.integers("eos_token_id") + text.integers("eos_token_id")
    return Facts({**text.values, "eos_token_id": list(dict.fromkeys(ends))}, facts.source)


def hf_by_attention(facts: Facts) -> tuple[Facts, Facts]:
    """Facts of layers with a sliding window, and of those that see everything: `rope_parameters`
    has something for each."""
    ropes = Facts(facts.mapping("rope_parameters"), facts.source)
    sliding, full = (
        Facts({**facts.values, "rope_parameters": ropes.mapping(kind)}, facts.source)
        for kind in ("sliding_attention", "full_attention")
    )
    return sliding, full


def hf_experts(facts: Facts) -> dict[str, Any]:
    """Number of experts, however it is spelled."""
    names = "num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"
    return {
        "num_experts": facts.integer(*names, maximum=2**16),
        "top_k": facts.integer("num_experts_per_tok", "moe_k", maximum=2**16),
    }


def hf_deepseek_router(facts: Facts) -> dict[str, Any]:
    """DeepSeek-V3's way to choose experts: by groups, and weighted by a sigmoid."""
    return {
        "router_scoring": "sigmoid",
        "normalize_top_k": facts.flag("norm_topk_prob", default=True),
        "routing_scale": facts.number("routed_scaling_factor", default=1.0),
        "expert_groups": facts.integer("n_group", default=1),
        "used_groups": facts.integer("topk_group", default=1),
    }


def hf_leading_dense_layers(facts: Facts, default: int) -> frozenset[int]:
    """Layers without experts: those that `mlp_layer_types` says, or the first ones."""
    types = facts.find("mlp_layer_types", default=None)
    if types is None:
        count = facts.integer("first_k_dense_replace", default=default, maximum=2**16)
        return frozenset(range(count))
    if not isinstance(types, list) or any(kind not in ("dense", "sparse") for kind in types):
        raise facts.error("mlp_layer_types", types, "a list of dense and sparse")
    return frozenset(layer for layer, kind in enumerate(types) if kind == "dense")


def hf_dense_layers(facts: Facts) -> frozenset[int]:
    """Layers without experts, by `decoder_sparse_step` and `mlp_only_layers`."""
    num_layers = facts.integer("num_hidden_layers", maximum=2**16)
    step = max(facts.integer("decoder_sparse_step", default=1), 1)
    skipped = {layer for layer in range(num_layers) if (layer + 1) % step}
    return frozenset(skipped.union(facts.integers("mlp_only_layers")))


def hf_full_layers(facts: Facts, period: int) -> frozenset[int]:
    """Layers without the sliding window: those that `layer_types` says, or every `period`-th."""
    num_layers = facts.integer("num_hidden_layers", maximum=2**16)
    types = facts.find("layer_types", default=None)
    if types is None:
        return frozenset(range(period - 1, num_layers, period))
    known = ["sliding_attention", "full_attention"]
    if not isinstance(types, list) or len(types) < num_layers or any(t not in known for t in types):
        raise facts.error("layer_types", types, f"{' or '.join(known)} for each layer")
    return frozenset(i for i in range(num_layers) if types[i] == "full_attention")


def hf_latent(facts: Facts) -> dict[str, Any]:
    """DeepSeek's multi-head latent attention."""
    latent = LatentConfig(
        kv_rank=facts.integer("kv_lora_rank", maximum=2**16),
        q_rank=facts.integer("q_lora_rank", default=0, maximum=2**16),
        nope_dim=facts.integer("qk_nope_head_dim", maximum=2**16),
        rope_dim=facts.integer("qk_rope_head_dim", maximum=2**16),
        value_dim=facts.integer("v_head_dim", maximum=2**16),
    )
    context_length = facts.integer("max_position_embeddings")
    rope = rope_from_hf(facts, latent.rope_dim, context_length, 10_000.0)
    adjacent = facts.flag("rope_interleave", default=True)
    scale = max(latent.nope_dim + latent.rope_dim, 1) ** -0.5
    return {
        "latent": latent,
        "head_dim": latent.kv_rank + latent.rope_dim,
        "num_kv_heads": 1,
        "rope": replace(rope, pairs="adjacent" if adjacent else "half"),
        "query_scale": scale * score_magnitude_from_hf(facts) ** 2,
    }


def hf_delta(facts: Facts) -> dict[str, Any]:
    """Qwen's gated DeltaNet, and which layers have attention instead."""
    num_layers = facts.integer("num_hidden_layers", maximum=2**16)
    types = facts.find("layer_types", default=None)
    if types is None:
        interval = max(facts.integer("full_attention_interval", default=4), 1)
        full = [(layer + 1) % interval == 0 for layer in range(num_layers)]
    else:
        known = "linear_attention", "full_attention"
        if not isinstance(types, list) or len(types) != num_layers or set(types) - set(known):
            raise facts.error("layer_types", types, f"{' or '.join(known)} for each layer")
        full = [kind == "full_attention" for kind in types]
    return {
        "delta": DeltaConfig(
            num_key_heads=facts.integer("linear_num_key_heads", maximum=2**16),
            num_value_heads=facts.integer("linear_num_value_heads", maximum=2**16),
            key_dim=facts.integer("linear_key_head_dim", maximum=2**16),
            value_dim=facts.integer("linear_value_head_dim", maximum=2**16),
            conv_size=facts.integer("linear_conv_kernel_dim", maximum=64),
        ),
        "delta_layers": frozenset(layer for layer in range(num_layers) if not full[layer]),
        "gated_attention": True,
        "norm_offset": 1.0,
        "qk_norm": "head",
    }


def hf_quarter_rope(facts: Facts, common: dict[str, Any]) -> dict[str, Any]:
    """Qwen's default: a quarter of each head is rotated."""
    rope, values = common["rope"], facts.find("rope_parameters", default={})
    if "partial_rotary_factor" in facts or "partial_rotary_factor" in values:
        return common
    return common | {"rope": replace(rope, dim=common["head_dim"] // 4)}
