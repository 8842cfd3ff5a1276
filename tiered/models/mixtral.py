"""Mixtral: Llama's attention, and experts in every layer (GGUF calls it llama, too)."""

from tiered.checkpoints.facts import Facts
from tiered.checkpoints.gguf_config import gguf_common, gguf_experts
from tiered.checkpoints.hf_config import hf_common, hf_experts
from tiered.checkpoints.tensor_names import GGUF, HF_BASE, HF_EXPERTS
from tiered.config import ModelConfig

GGUF_ARCHITECTURE = "llama"
HAS_EXPERTS = True
LAYER = "model.layers.{}.block_sparse_moe."
HF_NAMES = {
    **HF_BASE,
    **HF_EXPERTS,
    LAYER + "gate.weight": "layers.{}.router",
    LAYER + "experts.{}.w1.weight": "layers.{}.experts.{}.gate",
    LAYER + "experts.{}.w3.weight": "layers.{}.experts.{}.up",
    LAYER + "experts.{}.w2.weight": "layers.{}.experts.{}.down",
}
GGUF_NAMES = GGUF


def from_hf(facts: Facts) -> ModelConfig:
    return ModelConfig(
        model_type="mixtral",
        expert_size=facts.integer("intermediate_size"),
        sliding_window=facts.integer("sliding_window", default=0),
        **hf_common(facts, theta=1_000_000.0),
        **hf_experts(facts),
    )


def from_gguf(facts: Facts) -> ModelConfig:
    size = facts.integer("feed_forward_length")
    return ModelConfig(
        model_type="mixtral",
        expert_size=facts.integer("expert_feed_forward_length", default=size),
        **gguf_common(facts, pairs="adjacent"),
        **gguf_experts(facts, normalize_top_k=True),
    )
