"""What is Mellum's own in a tiny checkpoint: windows, and two rotary embeddings."""

from __future__ import annotations

from typing import Any

import gguf
from tiny_plain import write_attention

PERIOD = 2  # every second layer sees the whole text
WINDOW = 24
THETA = dict(sliding=10_000.0, full=500_000.0)
YARN = dict(factor=4.0, original_max_position_embeddings=64)


def is_full(layer: int) -> bool:
    return layer % PERIOD == PERIOD - 1


def add_layer(w: Any, hf: str, gg: str, layer: int) -> None:
    w.layer(hf, gg, layer)


def hf_config(s: dict[str, int]) -> dict[str, Any]:
    return dict(
        num_local_experts=s["experts"], num_experts_per_tok=s["top_k"], norm_topk_prob=True,
        moe_intermediate_size=s["expert_size"], intermediate_size=s["ffn_size"],
        sliding_window=WINDOW,
        layer_types=[
            "full_attention" if is_full(i) else "sliding_attention" for i in range(s["layers"])
        ],
        rope_parameters={
            "sliding_attention": dict(rope_type="default", rope_theta=THETA["sliding"]),
            "full_attention": dict(YARN, rope_type="yarn", rope_theta=THETA["full"]),
        },
    )  # fmt: skip


def write_metadata(writer: Any, s: dict[str, int]) -> None:
    write_attention(writer, s)
    writer.add_rope_freq_base(THETA["full"])
    writer.add_float32(f"{writer.arch}.rope.freq_base_swa", THETA["sliding"])
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(YARN["factor"])
    writer.add_rope_scaling_orig_ctx_len(YARN["original_max_position_embeddings"])
    writer.add_feed_forward_length(s["ffn_size"])
    writer.add_sliding_window(WINDOW)
    pattern = [not is_full(i) for i in range(s["layers"])]
    writer.add_array(f"{writer.arch}.attention.sliding_window_pattern", pattern)
