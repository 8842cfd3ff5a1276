"""Granite with experts (3.0 and 3.1): Mixtral's layers, whose embeddings, scores, results and
logits are multiplied with constants."""

from __future__ import annotations

from typing import Any

from tiered.checkpoints.facts import Facts
from tiered.checkpoints.gguf_config import gguf_common, gguf_experts
from tiered.checkpoints.hf_config import hf_common, hf_experts
from tiered.checkpoints.tensor_names import GGUF, HF_BASE, Names
from tiered.config import ModelConfig

GGUF_ARCHITECTURE = "granitemoe"
HAS_EXPERTS = True
HF_NAMES: Names = {
    **HF_BASE,
    "model.layers.{}.block_sparse_moe.router.layer.weight": "layers.{}.router",
    "model.layers.{}.block_sparse_moe.input_linear.weight": "layers.{}.experts.*.gate|up",
    "model.layers.{}.block_sparse_moe.output_linear.weight": "layers.{}.experts.*.down",
    "model.layers.{}.shared_mlp.input_linear.weight": "layers.{}.shared.gate|up",
    "model.layers.{}.shared_mlp.output_linear.weight": "layers.{}.shared.down",
}
GGUF_NAMES = GGUF


def from_hf(facts: Facts) -> ModelConfig:
    return ModelConfig(
        model_type="granitemoe",
        expert_size=facts.integer("intermediate_size"),
        shared_expert_size=facts.integer("shared_intermediate_size", default=0),
        **_scaled(
            hf_common(facts),
            embedding=facts.number("embedding_multiplier", default=1.0),
            scores=facts.number("attention_multiplier", default=1.0),
            results=facts.number("residual_multiplier", default=1.0),
            logits=facts.number("logits_scaling", default=1.0),
        ),
        **hf_experts(facts),
    )


def from_gguf(facts: Facts) -> ModelConfig:
    return ModelConfig(
        model_type="granitemoe",
        expert_size=facts.integer("feed_forward_length"),
        shared_expert_size=facts.integer("expert_shared_feed_forward_length", default=0),
        **_scaled(
            gguf_common(facts, pairs="adjacent"),
            embedding=facts.number("embedding_scale"),
            scores=facts.number("attention.scale"),
            results=facts.number("residual_scale"),
            logits=facts.number("logit_scale"),
        ),
        **gguf_experts(facts, normalize_top_k=True),
    )


def _scaled(
    common: dict[str, Any], embedding: float, scores: float, results: float, logits: float
) -> dict[str, Any]:
    """What is added to the hidden states is multiplied with `results`; instead, all of them are
    divided by it from the start. That is the same, because everything that reads them norms them:
    with eps divided by its square."""
    return common | {
        "embedding_scale": embedding / results,
        "norm_eps": common["norm_eps"] / results**2,
        "query_scale": scores,
        "logit_scale": 1 / logits,
    }
