"""GLM-4.7-Flash: DeepSeek-V3's layers; which of them are dense is said one by one."""

from dataclasses import replace

from tiered.checkpoints.facts import Facts
from tiered.checkpoints.hf_config import hf_leading_dense_layers
from tiered.checkpoints.tensor_names import HF_DRAFT_HEAD
from tiered.config import ModelConfig
from tiered.models import deepseek_v3

GGUF_ARCHITECTURE = ""  # deepseek_v2's
HAS_EXPERTS = True
HF_NAMES = {**deepseek_v3.HF_NAMES, **HF_DRAFT_HEAD}
GGUF_NAMES = deepseek_v3.GGUF_NAMES
from_gguf = deepseek_v3.from_gguf


def from_hf(facts: Facts) -> ModelConfig:
    config = deepseek_v3.from_hf(facts)
    dense = hf_leading_dense_layers(facts, default=1)
    return replace(config, model_type="glm4_moe_lite", dense_layers=dense)
