"""GLM-4.7-Flash: DeepSeek-V3's layers; which of them are dense is said one by one."""

from dataclasses import replace

from tiered.checkpoints.facts import Facts
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
    types = facts.find("mlp_layer_types", default=["dense"])
    if not isinstance(types, list) or any(kind not in ("dense", "sparse") for kind in types):
        raise facts.error("mlp_layer_types", types, "a list of dense and sparse")
    dense = frozenset(layer for layer, kind in enumerate(types) if kind == "dense")
    return replace(config, model_type="glm4_moe_lite", dense_layers=dense)
