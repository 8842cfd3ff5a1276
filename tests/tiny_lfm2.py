"""What is LFM2's own in a tiny checkpoint: short convolutions, and other names."""

from __future__ import annotations

from typing import Any

import gguf
import numpy as np

NUM_DENSE = 1  # layers, the first ones
NAMES = ("w1", "w3", "w2")
NORMS = {"operator_norm": "attn_norm", "ffn_norm": "ffn_norm"}


def is_conv(layer: int) -> bool:
    return layer % 2 == 0


def add_layer(w: Any, hf: str, gg: str, layer: int) -> None:
    s, hidden = w.s, w.s["hidden"]
    for name, stored in NORMS.items():
        w.add(hf + name, f"{gg}{stored}.weight", hidden)
    if is_conv(layer):
        w.add(hf + "conv.in_proj", gg + "shortconv.in_proj.weight", 3 * hidden, hidden)
        w.add(hf + "conv.out_proj", gg + "shortconv.out_proj.weight", hidden, hidden)
        conv = w.matrix(hidden, s["conv_size"])
        w.add_values(hf + "conv.conv.weight", "", conv[:, None])
        w.add_values("", gg + "shortconv.conv.weight", conv)
    else:
        q, kv = s["heads"] * s["head_dim"], s["kv_heads"] * s["head_dim"]
        for name, size in ("q", q), ("k", kv), ("v", kv):
            w.add(f"{hf}self_attn.{name}_proj", f"{gg}attn_{name}.weight", size, hidden)
        w.add(hf + "self_attn.out_proj", gg + "attn_output.weight", hidden, q)
        for name in "qk":
            stored = f"{gg}attn_{name}_norm.weight"
            w.add(f"{hf}self_attn.{name}_layernorm", stored, s["head_dim"])
    if layer < NUM_DENSE:
        w.feed_forward(hf + "feed_forward.", gg + "ffn_{}.weight", s["ffn_size"], NAMES)
        return
    experts = s["experts"]
    w.add(hf + "feed_forward.gate", gg + "ffn_gate_inp.weight", experts, hidden, scale=2.0)
    bias = w.rng.standard_normal(experts, np.float32) / 10
    w.add_values(hf + "feed_forward.expert_bias", gg + "exp_probs_b.bias", bias)
    for expert in range(experts):
        w.feed_forward(f"{hf}feed_forward.experts.{expert}.", "", s["expert_size"], NAMES)


def hf_config(s: dict[str, int]) -> dict[str, Any]:
    return dict(
        num_experts=s["experts"], num_experts_per_tok=s["top_k"],
        moe_intermediate_size=s["expert_size"], intermediate_size=s["ffn_size"],
        num_dense_layers=NUM_DENSE, conv_L_cache=s["conv_size"], norm_eps=1e-5,
        use_expert_bias=True, norm_topk_prob=True,
        layer_types=["conv" if is_conv(i) else "full_attention" for i in range(s["layers"])],
    )  # fmt: skip


def write_metadata(writer: Any, s: dict[str, int]) -> None:
    writer.add_head_count_kv([0 if is_conv(i) else s["kv_heads"] for i in range(s["layers"])])
    writer.add_rope_freq_base(10_000.0)
    writer.add_feed_forward_length(s["ffn_size"])
    writer.add_leading_dense_block_count(NUM_DENSE)
    writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
    writer.add_uint32(f"{writer.arch}.shortconv.l_cache", s["conv_size"])
