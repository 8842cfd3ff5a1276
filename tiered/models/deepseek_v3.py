"""DeepSeek-V3, R1 and Kimi-K2: V2's layers, and experts chosen by groups, corrected scores and
sigmoids. https://arxiv.org/abs/2412.19437"""

from tiered.checkpoints.facts import Facts
from tiered.checkpoints.hf_config import (
    hf_common,
    hf_deepseek_router,
    hf_experts,
    hf_latent,
    hf_leading_dense_layers,
)
from tiered.checkpoints.tensor_names import HF_DRAFTS
from tiered.config import ModelConfig
from tiered.models import deepseek_v2

GGUF_ARCHITECTURE = ""  # deepseek_v2's
HAS_EXPERTS = True
HF_NAMES = {
    **deepseek_v2.HF_NAMES,
    **HF_DRAFTS,  # with the model's own embedding and head
    "model.layers.{}.mlp.gate.e_score_correction_bias": "layers.{}.router_correction",
}
GGUF_NAMES = deepseek_v2.GGUF_NAMES
from_gguf = deepseek_v2.from_gguf


def from_hf(facts: Facts) -> ModelConfig:
    size = facts.integer("moe_intermediate_size")
    return ModelConfig(
        model_type="deepseek_v3",
        expert_size=size,
        shared_expert_size=size * facts.integer("n_shared_experts", default=1),
        ffn_size=facts.integer("intermediate_size"),
        dense_layers=hf_leading_dense_layers(facts, default=3),
        **(hf_common(facts) | hf_latent(facts)),
        **hf_experts(facts),
        **hf_deepseek_router(facts),
    )
