"""Kimi K2: DeepSeek-V3 with other numbers. https://arxiv.org/abs/2507.20534"""

from dataclasses import replace

from tiered.checkpoints.facts import Facts
from tiered.config import ModelConfig
from tiered.models import deepseek_v3

GGUF_ARCHITECTURE = ""  # deepseek_v2's
HAS_EXPERTS = True
HF_NAMES = deepseek_v3.HF_NAMES
GGUF_NAMES = deepseek_v3.GGUF_NAMES
from_gguf = deepseek_v3.from_gguf


def from_hf(facts: Facts) -> ModelConfig:
    return replace(deepseek_v3.from_hf(facts), model_type="kimi_k2")
