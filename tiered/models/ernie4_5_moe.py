"""ERNIE 4.5: neighbouring values rotate together, the choice of experts is corrected, and some
experts are used by every token."""

from tiered.checkpoints.facts import Facts
from tiered.checkpoints.gguf_config import gguf_common, gguf_experts
from tiered.checkpoints.hf_config import hf_common, hf_experts
from tiered.checkpoints.tensor_names import (
    GGUF,
    HF_BASE,
    HF_DENSE,
    HF_EXPERTS,
    HF_SHARED_EXPERTS,
)
from tiered.config import ModelConfig

GGUF_ARCHITECTURE = "ernie4_5-moe"
HAS_EXPERTS = True
HF_NAMES = {
    **HF_BASE,
    **HF_DENSE,
    **HF_EXPERTS,
    **HF_SHARED_EXPERTS,
    "model.layers.{}.mlp.moe_statics.e_score_correction_bias": "layers.{}.router_correction",
}
GGUF_NAMES = GGUF


def from_hf(facts: Facts) -> ModelConfig:
    if facts.flag("use_bias", default=False):
        raise facts.error("use_bias", True, "false")
    size = facts.integer("moe_intermediate_size")
    return ModelConfig(
        model_type="ernie4_5_moe",
        expert_size=size,
        shared_expert_size=size * facts.integer("moe_num_shared_experts", default=2),
        ffn_size=facts.integer("intermediate_size"),
        dense_layers=_dense_layers(facts),
        **hf_common(facts, theta=500_000.0, pairs="adjacent"),
        **hf_experts(facts),
    )


def _dense_layers(facts: Facts) -> frozenset[int]:
    num_layers = facts.integer("num_hidden_layers", maximum=2**16)
    start = facts.integer("moe_layer_start_index", default=1)
    interval = max(facts.integer("moe_layer_interval", default=1), 1)
    end = facts.find("moe_layer_end_index", default=-1)
    last = num_layers - 1 if end == -1 else facts.integer("moe_layer_end_index")
    return frozenset(
        layer for layer in range(num_layers) if not start <= layer <= last or (layer + 1) % interval
    )


def from_gguf(facts: Facts) -> ModelConfig:
    size = facts.integer("expert_feed_forward_length")
    shared = size * facts.integer("expert_shared_count", default=2)
    interval = facts.integer("interleave_moe_layer_step", default=1)
    if interval != 1:
        raise facts.error("interleave_moe_layer_step", interval, "1")
    return ModelConfig(
        model_type="ernie4_5_moe",
        expert_size=size,
        shared_expert_size=facts.integer("expert_shared_feed_forward_length", default=shared),
        ffn_size=facts.integer("feed_forward_length"),
        **gguf_common(facts, pairs="adjacent"),
        **gguf_experts(facts, normalize_top_k=True),
    )
