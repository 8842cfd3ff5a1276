"""What is Hy3's own in a tiny checkpoint."""

from __future__ import annotations

from typing import Any

from tiny_plain import write_attention

NUM_SHARED = 2
SCALE = 2.5  # of routing weights


def add_layer(w: Any, hf: str, gg: str, layer: int) -> None:
    w.layer(hf, gg, layer)
    w.found = [f._replace(gguf=f.gguf.replace("exp_probs_b.bias", "exp_probs_b")) for f in w.found]


def hf_config(s: dict[str, int]) -> dict[str, Any]:
    return dict(
        num_experts=s["experts"], num_experts_per_tok=s["top_k"], num_shared_experts=NUM_SHARED,
        moe_intermediate_size=s["expert_size"], intermediate_size=s["ffn_size"],
        router_scaling_factor=SCALE, first_k_dense_replace=1,
    )  # fmt: skip


def write_metadata(writer: Any, s: dict[str, int]) -> None:
    write_attention(writer, s)
    writer.add_rope_freq_base(10_000.0)
    writer.add_feed_forward_length(s["ffn_size"])
    writer.add_expert_shared_feed_forward_length(NUM_SHARED * s["expert_size"])
    writer.add_expert_weights_scale(SCALE)
