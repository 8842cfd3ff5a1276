"""Qwen3-VL with experts: Qwen3-MoE that also sees images, of which the text part is read."""

from dataclasses import replace

from tiered.checkpoints.facts import Facts
from tiered.checkpoints.hf_config import hf_text_part
from tiered.checkpoints.tensor_names import with_text_part
from tiered.config import ModelConfig
from tiered.models import qwen3_moe

GGUF_ARCHITECTURE = "qwen3vlmoe"
HAS_EXPERTS = True
HF_NAMES = with_text_part(
    {
        **qwen3_moe.HF_NAMES,
        "model.layers.{}.mlp.experts.gate_up_proj": "layers.{}.experts.*.gate|up^T",
        "model.layers.{}.mlp.experts.down_proj": "layers.{}.experts.*.down^T",
    }
)
GGUF_NAMES = qwen3_moe.GGUF_NAMES


def from_hf(facts: Facts) -> ModelConfig:
    """Its rotary embedding has positions in time, height and width, which are the same in text."""
    config = qwen3_moe.from_hf(hf_text_part(facts))
    return replace(config, model_type="qwen3_vl_moe", normalize_top_k=True)


def from_gguf(facts: Facts) -> ModelConfig:
    return replace(qwen3_moe.from_gguf(facts), model_type="qwen3_vl_moe")
