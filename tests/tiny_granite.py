"""What is Granite's own in a tiny checkpoint: fused matrices and four constants."""

from __future__ import annotations

from typing import Any

import numpy as np

SCALES = dict(embedding=6.0, scores=0.2, results=0.3, logits=4.0)


def add_layer(w: Any, hf: str, gg: str, layer: int, shared: bool = False) -> None:
    s, hidden = w.s, w.s["hidden"]
    w.add(hf + "input_layernorm", gg + "attn_norm.weight", hidden)
    w.add(hf + "post_attention_layernorm", gg + "ffn_norm.weight", hidden)
    w.attention(hf + "self_attn.", gg)
    moe, router = hf + "block_sparse_moe.", gg + "ffn_gate_inp.weight"
    w.add(moe + "router.layer", router, s["experts"], hidden, scale=2.0)
    for prefix, suffix, count, size in (
        (moe, "exps", (s["experts"],), s["expert_size"]),
        (hf + "shared_mlp.", "shexp", (), s["shared_size"]),
    )[: 1 + shared]:
        gate, up = (w.matrix(*count, size, hidden) for _ in range(2))
        down = w.matrix(*count, hidden, size)
        w.add_values(prefix + "input_linear.weight", "", np.concatenate([gate, up], axis=-2))
        w.add_values(prefix + "output_linear.weight", f"{gg}ffn_down_{suffix}.weight", down)
        w.add_values("", f"{gg}ffn_gate_{suffix}.weight", gate)
        w.add_values("", f"{gg}ffn_up_{suffix}.weight", up)


def hf_config(s: dict[str, int]) -> dict[str, Any]:
    return dict(
        num_local_experts=s["experts"], num_experts_per_tok=s["top_k"],
        intermediate_size=s["expert_size"],
        embedding_multiplier=SCALES["embedding"], attention_multiplier=SCALES["scores"],
        residual_multiplier=SCALES["results"], logits_scaling=SCALES["logits"],
    )  # fmt: skip


def write_metadata(writer: Any, s: dict[str, int], kv_heads: list[int] | None = None) -> None:
    writer.add_head_count_kv(kv_heads or s["kv_heads"])
    writer.add_rope_dimension_count(s["head_dim"])
    writer.add_rope_freq_base(10_000.0)
    writer.add_feed_forward_length(s["expert_size"])
    names = ("embedding_scale", "attention.scale", "residual_scale", "logit_scale")
    for name, value in zip(names, SCALES.values(), strict=True):
        writer.add_float32(f"{writer.arch}.{name}", value)
