"""Solar Open: Llama's attention, experts chosen as DeepSeek-V3 chooses them in every layer, and one
that every token uses. GGUF gives GLM-4.5 the same name.
https://huggingface.co/upstage/Solar-Open-100B"""

from tiered.checkpoints.facts import Facts
from tiered.checkpoints.hf_config import hf_common, hf_deepseek_router, hf_experts
from tiered.config import ModelConfig
from tiered.models import glm4_moe

GGUF_ARCHITECTURE = ""  # glm4_moe's
HAS_EXPERTS = True
HF_NAMES = glm4_moe.HF_NAMES
GGUF_NAMES = glm4_moe.GGUF_NAMES
from_gguf = glm4_moe.from_gguf


def from_hf(facts: Facts) -> ModelConfig:
    size = facts.integer("moe_intermediate_size")
    return ModelConfig(
        model_type="solar_open",
        expert_size=size,
        shared_expert_size=size * facts.integer("n_shared_experts", default=1),
        **hf_common(facts, theta=1_000_000.0),
        **hf_experts(facts),
        **hf_deepseek_router(facts),
    )
