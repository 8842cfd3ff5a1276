"""What is Phi-3.5-MoE's own in a tiny checkpoint: biases of norms and of the head, LongRoPE."""

from __future__ import annotations

from typing import Any

import numpy as np

SHORT_CONTEXT = 256
MAGNITUDE = 1.25
NAMES = ("w1", "w3", "w2")
NORMS = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}


def add_head(w: Any) -> None:
    w.add("model.norm.bias", "output_norm.bias", w.s["hidden"])
    w.add("lm_head.bias", "output.bias", w.s["vocab"])


def add_layer(w: Any, hf: str, gg: str, layer: int) -> None:
    s, hidden = w.s, w.s["hidden"]
    if layer == 0:
        add_head(w)
    for name, stored in NORMS.items():
        w.add(hf + name, f"{gg}{stored}.weight", hidden)
        w.add(f"{hf}{name}.bias", f"{gg}{stored}.bias", hidden)
    w.attention(hf + "self_attn.", gg)
    moe = hf + "block_sparse_moe."
    w.add(moe + "gate", gg + "ffn_gate_inp.weight", s["experts"], hidden, scale=2.0)
    for expert in range(s["experts"]):
        w.feed_forward(f"{moe}experts.{expert}.", "", s["expert_size"], NAMES)


def rope_factors(s: dict[str, int]) -> dict[str, np.ndarray]:
    """Divisors of the frequencies, for short contexts and for long ones."""
    half = s["head_dim"] // 2
    return dict(short=1 + np.arange(half) / 16, long=1 + np.arange(half) / 2)


def hf_config(s: dict[str, int]) -> dict[str, Any]:
    factors = {f"{name}_factor": f.tolist() for name, f in rope_factors(s).items()}
    return dict(
        num_local_experts=s["experts"], num_experts_per_tok=s["top_k"],
        intermediate_size=s["expert_size"], attention_bias=True, lm_head_bias=True,
        original_max_position_embeddings=SHORT_CONTEXT, router_jitter_noise=0.01,
        rope_scaling=dict(factors, type="longrope", short_mscale=MAGNITUDE, long_mscale=MAGNITUDE,
                          original_max_position_embeddings=SHORT_CONTEXT),
    )  # fmt: skip


def write_metadata(writer: Any, s: dict[str, int]) -> None:
    writer.add_head_count_kv(s["kv_heads"])
    writer.add_rope_dimension_count(s["head_dim"])
    writer.add_rope_freq_base(10_000.0)
    writer.add_rope_scaling_attn_factors(MAGNITUDE)
    writer.add_rope_scaling_orig_ctx_len(SHORT_CONTEXT)
    writer.add_feed_forward_length(s["expert_size"])
