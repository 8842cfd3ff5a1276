"""What is Gemma 4's own in a tiny checkpoint: two shapes of attention, norms everywhere."""

from __future__ import annotations

from typing import Any

import numpy as np

PERIOD = 2  # every second layer sees the whole text (of the real ones, every sixth)
WINDOW = 24
SOFTCAP = 20.0
PARTIAL = 0.25  # of the pairs in those layers rotate
NORMS = {
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm_1": "post_ffw_norm_1",
    "pre_feedforward_layernorm_2": "pre_ffw_norm_2",
    "post_feedforward_layernorm_2": "post_ffw_norm_2",
    "post_feedforward_layernorm": "post_ffw_norm",
}


def is_full(layer: int) -> bool:
    return layer % PERIOD == PERIOD - 1


def shape(s: dict[str, int], layer: int) -> tuple[int, int]:
    """Heads of keys, and values of a head."""
    return (1, 2 * s["head_dim"]) if is_full(layer) else (s["kv_heads"], s["head_dim"])


def rope_factors(s: dict[str, int]) -> np.ndarray:
    half = s["head_dim"]  # of a head in a full layer
    return np.where(np.arange(half) < PARTIAL * half, 1, 1e30).astype(np.float32)


def add_attention(w: Any, hf: str, gg: str, layer: int) -> None:
    hidden, (kv_heads, size) = w.s["hidden"], shape(w.s, layer)
    q, kv = w.s["heads"] * size, kv_heads * size
    w.add(hf + "q_proj", gg + "attn_q.weight", q, hidden)
    w.add(hf + "k_proj", gg + "attn_k.weight", kv, hidden)
    if not is_full(layer):
        w.add(hf + "v_proj", gg + "attn_v.weight", kv, hidden)
    w.add(hf + "o_proj", gg + "attn_output.weight", hidden, q)
    w.add(hf + "q_norm", gg + "attn_q_norm.weight", size)
    w.add(hf + "k_norm", gg + "attn_k_norm.weight", size)


def add_layer(w: Any, hf: str, gg: str, layer: int) -> None:
    s, hidden = w.s, w.s["hidden"]
    w.add(hf + "input_layernorm", gg + "attn_norm.weight", hidden)
    w.add(hf + "post_attention_layernorm", gg + "post_attention_norm.weight", hidden)
    add_attention(w, hf + "self_attn.", gg, layer)
    for name, stored in NORMS.items():
        w.add(hf + name, f"{gg}{stored}.weight", hidden)
    w.feed_forward(hf + "mlp.", gg + "ffn_{}.weight", s["ffn_size"])
    w.add(hf + "router.proj", gg + "ffn_gate_inp.weight", s["experts"], hidden, scale=2.0)
    vectors = {
        ("layer_scalar", "layer_output_scale.weight"): 1,
        ("router.scale", "ffn_gate_inp.scale"): hidden,
        ("router.per_expert_scale", "ffn_down_exps.scale"): s["experts"],
    }
    for (name, stored), size in vectors.items():
        w.add(hf + name, gg + stored, size)
        w.found.append(w.found.pop()._replace(hf=hf + name))  # without ".weight"
    both = w.matrix(s["experts"], 2 * s["expert_size"], hidden)
    down = w.matrix(s["experts"], hidden, s["expert_size"])
    w.add_values(hf + "experts.gate_up_proj", gg + "ffn_gate_up_exps.weight", both)
    w.add_values(hf + "experts.down_proj", gg + "ffn_down_exps.weight", down)


def hf_config(s: dict[str, int]) -> dict[str, Any]:
    kv_heads, size = shape(s, PERIOD - 1)
    return dict(
        enable_moe_block=True, num_experts=s["experts"], top_k_experts=s["top_k"],
        moe_intermediate_size=s["expert_size"], intermediate_size=s["ffn_size"],
        hidden_activation="gelu_pytorch_tanh", hidden_size_per_layer_input=0,
        final_logit_softcapping=SOFTCAP, sliding_window=WINDOW, attention_k_eq_v=True,
        global_head_dim=size, num_global_key_value_heads=kv_heads,
        layer_types=[
            "full_attention" if is_full(i) else "sliding_attention" for i in range(s["layers"])
        ],
        rope_parameters={
            "sliding_attention": dict(rope_type="default", rope_theta=10_000.0),
            "full_attention": dict(
                rope_type="proportional", partial_rotary_factor=PARTIAL, rope_theta=1_000_000.0
            ),
        },
    )  # fmt: skip


def write_metadata(writer: Any, s: dict[str, int]) -> None:
    layers, size = range(s["layers"]), shape(s, PERIOD - 1)[1]
    writer.add_head_count_kv([shape(s, i)[0] for i in layers])
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_rope_dimension_count(size)
    writer.add_rope_freq_base(1_000_000.0)
    writer.add_sliding_window(WINDOW)
    writer.add_final_logit_softcapping(SOFTCAP)
    writer.add_feed_forward_length(s["ffn_size"])
    prefix = f"{writer.arch}."
    for name in ("attention.key_length_swa", "attention.value_length_swa",
                 "rope.dimension_count_swa"):  # fmt: skip
        writer.add_uint32(prefix + name, s["head_dim"])
    writer.add_array(prefix + "attention.sliding_window_pattern", [not is_full(i) for i in layers])
    writer.add_float32(prefix + "rope.freq_base_swa", 10_000.0)
    writer.add_uint32(prefix + "embedding_length_per_layer_input", 0)
