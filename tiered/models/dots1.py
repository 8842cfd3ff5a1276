"""dots.llm1: Qwen3's attention, experts chosen as DeepSeek-V3 chooses them, and some that every
token uses. https://arxiv.org/abs/2506.05767"""

from tiered.checkpoints.facts import Facts
from tiered.checkpoints.gguf_config import gguf_common, gguf_experts
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

GGUF_ARCHITECTURE = "dots1"
HAS_EXPERTS = True
HF_NAMES = {
    **HF_BASE,
    **HF_DENSE,
    **HF_EXPERTS,
    **HF_SHARED_EXPERTS,
    "model.layers.{}.mlp.gate.e_score_correction_bias": "layers.{}.router_correction",
}
GGUF_NAMES = GGUF


def from_hf(facts: Facts) -> ModelConfig:
    size = facts.integer("moe_intermediate_size")
    return ModelConfig(
        model_type="dots1",
        expert_size=size,
        shared_expert_size=size * facts.integer("n_shared_experts", default=0),
        ffn_size=facts.integer("intermediate_size"),
        dense_layers=hf_leading_dense_layers(facts, default=0),
        qk_norm="head",
        sliding_window=facts.integer("sliding_window", default=0),
        full_layers=_full_layers(facts),
        **hf_common(facts),
        **hf_experts(facts),
        **hf_deepseek_router(facts)
        | {"normalize_top_k": facts.flag("norm_topk_prob", default=False)},
    )


def _full_layers(facts: Facts) -> frozenset[int]:
    """Without the sliding window: the first `max_window_layers`, where files do not list them."""
    if "layer_types" in facts:
        return hf_full_layers(facts, period=1)
    return frozenset(range(facts.integer("max_window_layers", default=2**16, maximum=2**16)))


def from_gguf(facts: Facts) -> ModelConfig:
    size = facts.integer("expert_feed_forward_length")
    return ModelConfig(
        model_type="dots1",
        expert_size=size,
        shared_expert_size=size * facts.integer("expert_shared_count", default=0),
        ffn_size=facts.integer("feed_forward_length"),
        qk_norm="head",
        **gguf_common(facts, pairs="half"),
        **gguf_experts(facts, normalize_top_k=True, scoring="sigmoid"),
    )
