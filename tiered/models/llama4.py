"""Llama 4: experts whose inputs are weighted, in all or in every second layer; attention by chunks,
and by the whole text in every fourth layer, which has no rotary embedding. Of a checkpoint that
also sees images, the text part is read. https://ai.meta.com/blog/llama-4-multimodal-intelligence"""

from __future__ import annotations

from typing import Any

from tiered.checkpoints.facts import Facts
from tiered.checkpoints.gguf_config import gguf_common, gguf_experts, gguf_num_layers
from tiered.checkpoints.hf_config import hf_common, hf_experts, hf_text_part
from tiered.checkpoints.tensor_names import GGUF, HF_BASE, PROJECTIONS, Names
from tiered.config import ModelConfig

GGUF_ARCHITECTURE = "llama4"
HAS_EXPERTS = True
LAYER, EXPERTS = "model.layers.{}.feed_forward.", "layers.{}.experts.*."
TEXT_NAMES: Names = {
    **HF_BASE,
    LAYER + "router.weight": "layers.{}.router",
    LAYER + "experts.gate_up_proj": EXPERTS + "gate|up^T",
    LAYER + "experts.down_proj": EXPERTS + "down^T",
    **{f"{LAYER}{name}_proj.weight": f"layers.{{}}.ffn.{name}" for name in PROJECTIONS},
    **{
        f"{LAYER}shared_expert.{name}_proj.weight": f"layers.{{}}.shared.{name}"
        for name in PROJECTIONS
    },
}
HF_NAMES: Names = {
    **TEXT_NAMES,
    **{f"language_model.{name}": canonical for name, canonical in TEXT_NAMES.items()},
}
GGUF_NAMES = GGUF
FIXED: dict[str, Any] = {
    "model_type": "llama4",
    "router_scoring": "sigmoid",
    "normalize_top_k": False,
    "weighted_inputs": True,
    "full_layers_rotate": False,
}
# What GGUF does not say, the same in all files.
CHUNK, PERIOD, TEMPERATURE = 8192, 4, 0.1
MAVERICK_EXPERTS = 128  # a model of so many has no norms of queries and keys


def from_hf(facts: Facts) -> ModelConfig:
    facts = hf_text_part(facts)
    size = facts.integer("intermediate_size")
    common = hf_common(facts, theta=500_000.0, pairs="adjacent")
    num_layers = common["num_layers"]
    still = _still_layers(facts, num_layers)
    chunk = _chunk(facts, num_layers, still)
    return ModelConfig(
        **FIXED,
        expert_size=size,
        shared_expert_size=size,
        ffn_size=facts.integer("intermediate_size_mlp", default=0),
        dense_layers=_dense_layers(facts, num_layers),
        full_layers=still,
        sliding_window=chunk,
        chunked_attention=chunk > 0,
        qk_norm="unit" if facts.flag("use_qk_norm", default=True) else "",
        temperature=facts.number("attn_scale", default=TEMPERATURE),
        temperature_step=_temperature_step(facts),
        **common,
        **hf_experts(facts),
    )


def _still_layers(facts: Facts, num_layers: int) -> frozenset[int]:
    """Layers without rotary embedding; `no_rope_layers` has 0 for them, and 1 for the others."""
    flags = facts.integers("no_rope_layers")
    if not flags:
        period = max(facts.integer("no_rope_layer_interval", default=PERIOD), 1)
        return frozenset(range(period - 1, num_layers, period))
    if len(flags) < num_layers or set(flags) - {0, 1}:
        raise facts.error("no_rope_layers", list(flags), "0 or 1 for each layer")
    return frozenset(layer for layer in range(num_layers) if not flags[layer])


def _chunk(facts: Facts, num_layers: int, still: frozenset[int]) -> int:
    """Positions of a chunk; 0 where all layers see the whole text. `layer_types` may say so, and
    nothing else than follows from which layers rotate."""
    name = "attention_chunk_size"
    chunk = facts.integer(name, default=0 if name in facts.values else CHUNK)  # null: none
    types = facts.find("layer_types", default=None)
    full = ["full_attention"] * num_layers
    mixed = [full[i] if i in still else "chunked_attention" for i in range(num_layers)]
    if types is None or (types == mixed and chunk):
        return chunk
    if types != full:
        raise facts.error("layer_types", types, "chunked_attention where layers rotate")
    return 0


def _temperature_step(facts: Facts) -> int:
    """0: without. Older files have the tuning as a number."""
    tuned = facts.find("attn_temperature_tuning", default=True)
    if not isinstance(tuned, bool | int):
        raise facts.error("attn_temperature_tuning", tuned, "true or false")
    step = facts.integer("floor_scale", default=CHUNK)
    if tuned and not step:
        raise facts.error("floor_scale", step, "at least 1")
    return step if tuned else 0


def _dense_layers(facts: Facts, num_layers: int) -> frozenset[int]:
    if "moe_layers" in facts:
        return frozenset(range(num_layers)) - frozenset(facts.integers("moe_layers"))
    step = max(facts.integer("interleave_moe_layer_step", default=1), 1)
    return frozenset(layer for layer in range(num_layers) if (layer + 1) % step)


def from_gguf(facts: Facts) -> ModelConfig:
    size, num_layers = facts.integer("expert_feed_forward_length"), gguf_num_layers(facts)
    if facts.integer("attention.sliding_window", default=CHUNK) == 0:
        raise facts.error("attention.sliding_window", 0, f"{CHUNK} (or absent)")
    experts = gguf_experts(facts, normalize_top_k=False) | FIXED
    experts["dense_layers"] = _dense_layers(facts, num_layers)
    return ModelConfig(
        **experts,
        expert_size=size,
        shared_expert_size=size,
        ffn_size=facts.integer("feed_forward_length", default=0),
        full_layers=frozenset(range(PERIOD - 1, num_layers, PERIOD)),
        sliding_window=CHUNK,
        chunked_attention=True,
        qk_norm="" if experts["num_experts"] == MAVERICK_EXPERTS else "unit",
        temperature=TEMPERATURE,
        temperature_step=CHUNK,
        **gguf_common(facts, pairs="adjacent"),
    )
