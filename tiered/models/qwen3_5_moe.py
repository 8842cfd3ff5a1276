"""Qwen3.5 and 3.6: Qwen3-Next's layers with other names. Of a checkpoint that also sees images,
the text part is read."""

from dataclasses import replace

from tiered.checkpoints.facts import Facts
from tiered.checkpoints.gguf_config import gguf_common, gguf_delta, gguf_experts
from tiered.checkpoints.hf_config import hf_text_part
from tiered.checkpoints.tensor_names import with_text_part
from tiered.config import ModelConfig
from tiered.models import qwen3_next

GGUF_ARCHITECTURE = "qwen35moe"
HAS_EXPERTS = True
HF_NAMES = with_text_part(qwen3_next.HF_NAMES)
GGUF_NAMES = qwen3_next.GGUF_NAMES


def from_hf(facts: Facts) -> ModelConfig:
    return replace(qwen3_next.from_hf(hf_text_part(facts)), model_type="qwen3_5_moe")


def from_gguf(facts: Facts) -> ModelConfig:
    size = facts.integer("expert_feed_forward_length")
    return ModelConfig(
        model_type="qwen3_5_moe",
        expert_size=size,
        shared_expert_size=facts.integer("expert_shared_feed_forward_length", default=size),
        **gguf_common(facts, pairs="half"),
        **gguf_experts(facts, normalize_top_k=True),
        **gguf_delta(facts, is_tiled=True),
    )
