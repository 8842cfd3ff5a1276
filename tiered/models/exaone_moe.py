"""K-EXAONE: of four layers, three have a short window and one sees the whole text, without rotary
embedding; experts are chosen as DeepSeek-V3 chooses them.
https://huggingface.co/LGAI-EXAONE/K-EXAONE-236B-A23B"""

from tiered.checkpoints.facts import Facts
from tiered.checkpoints.gguf_config import gguf_common, gguf_experts, gguf_full_layers
from tiered.checkpoints.hf_config import (
    hf_common,
    hf_deepseek_router,
    hf_experts,
    hf_full_layers,
    hf_leading_dense_layers,
)
from tiered.checkpoints.tensor_names import (
    GGUF,
    HF_BASE,
    HF_DENSE,
    HF_EXPERTS,
    HF_SHARED_EXPERTS,
)
from tiered.config import ModelConfig

GGUF_ARCHITECTURE = "exaone-moe"
HAS_EXPERTS = True
HF_NAMES = {
    **HF_BASE,
    **HF_DENSE,
    **HF_EXPERTS,
    **HF_SHARED_EXPERTS,
    "model.layers.{}.mlp.e_score_correction_bias": "layers.{}.router_correction",
}
GGUF_NAMES = GGUF
PERIOD, PATTERN = 4, "LLLG"


def from_hf(facts: Facts) -> ModelConfig:
    pattern = facts.find("sliding_window_pattern", default=PERIOD)
    if "layer_types" not in facts and pattern not in (PERIOD, PATTERN):
        raise facts.error("sliding_window_pattern", pattern, f"{PERIOD}, or layer_types be there")
    size = facts.integer("moe_intermediate_size")
    window = facts.integer("sliding_window", default=0)
    return ModelConfig(
        model_type="exaone_moe",
        expert_size=size,
        shared_expert_size=size * facts.integer("num_shared_experts", default=1),
        ffn_size=facts.integer("intermediate_size"),
        dense_layers=hf_leading_dense_layers(facts, default=1),
        qk_norm="head",
        sliding_window=window,
        full_layers=hf_full_layers(facts, PERIOD),
        full_layers_rotate=not window,
        **hf_common(facts),
        **hf_experts(facts),
        **hf_deepseek_router(facts),
    )


def from_gguf(facts: Facts) -> ModelConfig:
    size = facts.integer("expert_feed_forward_length")
    shared = size * facts.integer("expert_shared_count", default=1)
    return ModelConfig(
        model_type="exaone_moe",
        expert_size=size,
        shared_expert_size=facts.integer("expert_shared_feed_forward_length", default=shared),
        ffn_size=facts.integer("feed_forward_length"),
        qk_norm="head",
        sliding_window=facts.integer("attention.sliding_window"),
        full_layers=gguf_full_layers(facts, PERIOD),
        full_layers_rotate=False,
        **gguf_common(facts, pairs="half"),
        **gguf_experts(facts, normalize_top_k=True, scoring="sigmoid"),
    )
