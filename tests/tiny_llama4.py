"""What is Llama 4's own in a tiny checkpoint: transposed experts in every second layer, chunks, and
layers without rotary embedding."""

from __future__ import annotations

from typing import Any

import numpy as np

STEP = 2  # layers to the next one with experts
NORMS = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}


def add_layer(w: Any, hf: str, gg: str, layer: int) -> None:
    s, hidden = w.s, w.s["hidden"]
    for name, stored in NORMS.items():
        w.add(hf + name, f"{gg}{stored}.weight", hidden)
    w.attention(hf + "self_attn.", gg)
    hf += "feed_forward."
    if (layer + 1) % STEP:
        w.feed_forward(hf, gg + "ffn_{}.weight", s["ffn_size"])
        return
    w.add(hf + "router", gg + "ffn_gate_inp.weight", s["experts"], hidden, scale=2.0)
    w.feed_forward(hf + "shared_expert.", gg + "ffn_{}_shexp.weight", s["expert_size"])
    gate, up = (w.matrix(s["experts"], s["expert_size"], hidden) for _ in range(2))
    down = w.matrix(s["experts"], hidden, s["expert_size"])
    both = np.concatenate([gate, up], 1).swapaxes(1, 2).copy()
    w.add_values(hf + "experts.gate_up_proj", "", both)
    w.add_values(hf + "experts.down_proj", "", down.swapaxes(1, 2).copy())
    for name, values in ("gate", gate), ("up", up), ("down", down):
        w.add_values("", f"{gg}ffn_{name}_exps.weight", values)


def hf_config(s: dict[str, int]) -> dict[str, Any]:
    return dict(
        num_local_experts=s["experts"], num_experts_per_tok=s["top_k"],
        intermediate_size=s["expert_size"], intermediate_size_mlp=s["ffn_size"],
        interleave_moe_layer_step=STEP, attention_chunk_size=8192, floor_scale=8192,
        attn_scale=0.1,
    )  # fmt: skip


def write_metadata(writer: Any, s: dict[str, int]) -> None:
    writer.add_head_count_kv(s["kv_heads"])
    writer.add_key_length(s["head_dim"])
    writer.add_value_length(s["head_dim"])
    writer.add_rope_dimension_count(s["head_dim"])
    writer.add_rope_freq_base(10_000.0)
    writer.add_feed_forward_length(s["ffn_size"])
    writer.add_interleave_moe_layer_step(STEP)
