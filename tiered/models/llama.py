"""Llama: every layer is dense."""

from tiered.checkpoints.facts import Facts
from tiered.checkpoints.gguf_config import gguf_common
from tiered.checkpoints.hf_config import hf_common
from tiered.checkpoints.tensor_names import GGUF, HF_BASE, HF_DENSE
from tiered.config import ModelConfig

GGUF_ARCHITECTURE = "llama"
HAS_EXPERTS = False
HF_NAMES = {**HF_BASE, **HF_DENSE}
GGUF_NAMES = GGUF


def from_hf(facts: Facts) -> ModelConfig:
    if facts.flag("mlp_bias", default=False):
        raise facts.error("mlp_bias", True, "false")
    return ModelConfig(
        model_type="llama", ffn_size=facts.integer("intermediate_size"), **hf_common(facts)
    )


def from_gguf(facts: Facts) -> ModelConfig:
    return ModelConfig(
        model_type="llama",
        ffn_size=facts.integer("feed_forward_length"),
        **gguf_common(facts, pairs="adjacent"),
    )
