"""MiniMax-M2: Mixtral's names, norms over all heads together, sigmoid scores."""

from tiered.checkpoints.facts import Facts
from tiered.checkpoints.gguf_config import gguf_common, gguf_experts
from tiered.checkpoints.hf_config import hf_common, hf_experts
from tiered.checkpoints.tensor_names import GGUF
from tiered.config import ModelConfig
from tiered.models import mixtral

GGUF_ARCHITECTURE = "minimax-m2"
HAS_EXPERTS = True
HF_NAMES = {
    **mixtral.HF_NAMES,
    mixtral.LAYER + "e_score_correction_bias": "layers.{}.router_correction",
}
GGUF_NAMES = GGUF


def from_hf(facts: Facts) -> ModelConfig:
    return ModelConfig(
        model_type="minimax_m2",
        expert_size=facts.integer("intermediate_size"),
        qk_norm="full",
        router_scoring="sigmoid",
        **hf_common(facts, theta=5_000_000.0),
        **hf_experts(facts),
    )


def from_gguf(facts: Facts) -> ModelConfig:
    return ModelConfig(
        model_type="minimax_m2",
        expert_size=facts.integer("expert_feed_forward_length"),
        qk_norm="full",
        **gguf_common(facts, pairs="half"),
        **gguf_experts(facts, normalize_top_k=True, scoring="sigmoid"),
    )
