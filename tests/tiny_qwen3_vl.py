"""What is Qwen3-VL's own in a tiny checkpoint: experts fused and transposed."""

from __future__ import annotations

from typing import Any

import numpy as np
from tiny_plain import write_attention

SECTIONS = [3, 3, 2]  # pairs of values that rotate by time, height and width


def add_layer(w: Any, hf: str, gg: str, layer: int) -> None:
    s, hidden, experts = w.s, w.s["hidden"], w.s["experts"]
    w.add(hf + "input_layernorm", gg + "attn_norm.weight", hidden)
    w.add(hf + "post_attention_layernorm", gg + "ffn_norm.weight", hidden)
    w.attention(hf + "self_attn.", gg)
    w.add(hf + "mlp.gate", gg + "ffn_gate_inp.weight", experts, hidden, scale=2.0)
    gate, up = (w.matrix(experts, s["expert_size"], hidden) for _ in range(2))
    down = w.matrix(experts, hidden, s["expert_size"])
    both = np.concatenate([gate, up], 1).swapaxes(1, 2)
    w.add_values(hf + "mlp.experts.gate_up_proj", "", both.copy())
    w.add_values(hf + "mlp.experts.down_proj", "", down.swapaxes(1, 2).copy())
    for name, values in ("gate", gate), ("up", up), ("down", down):
        w.add_values("", f"{gg}ffn_{name}_exps.weight", values)


def hf_config(s: dict[str, int]) -> dict[str, Any]:
    return dict(
        num_experts=s["experts"], num_experts_per_tok=s["top_k"], norm_topk_prob=True,
        moe_intermediate_size=s["expert_size"], intermediate_size=s["ffn_size"],
        rope_scaling=dict(rope_type="default", mrope_section=SECTIONS, mrope_interleaved=True),
    )  # fmt: skip


def write_metadata(writer: Any, s: dict[str, int]) -> None:
    write_attention(writer, s)
    writer.add_rope_freq_base(10_000.0)
    writer.add_feed_forward_length(s["ffn_size"])
    writer.add_rope_dimension_sections([*SECTIONS, 0])
