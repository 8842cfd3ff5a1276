"""What is K-EXAONE's own in a tiny checkpoint: windows, and layers that do not rotate."""

from __future__ import annotations

from typing import Any

from tiny_plain import write_attention

PERIOD = 2  # every second layer sees the whole text (of the real ones, every fourth)
WINDOW = 24
NUM_SHARED = 2


def is_full(layer: int) -> bool:
    return layer % PERIOD == PERIOD - 1


def add_layer(w: Any, hf: str, gg: str, layer: int) -> None:
    w.layer(hf, gg, layer)


def hf_config(s: dict[str, int]) -> dict[str, Any]:
    return dict(
        num_experts=s["experts"], num_experts_per_tok=s["top_k"], num_shared_experts=NUM_SHARED,
        moe_intermediate_size=s["expert_size"], intermediate_size=s["ffn_size"],
        first_k_dense_replace=1, routed_scaling_factor=1.5, norm_topk_prob=True, n_group=4,
        topk_group=2, sliding_window=WINDOW, sliding_window_pattern="LG",
        layer_types=[
            "full_attention" if is_full(i) else "sliding_attention" for i in range(s["layers"])
        ],
    )  # fmt: skip


def write_metadata(writer: Any, s: dict[str, int]) -> None:
    write_attention(writer, s)
    writer.add_rope_freq_base(10_000.0)
    writer.add_feed_forward_length(s["ffn_size"])
    writer.add_expert_shared_feed_forward_length(NUM_SHARED * s["expert_size"])
    writer.add_sliding_window(WINDOW)
    pattern = [not is_full(i) for i in range(s["layers"])]
    writer.add_array(f"{writer.arch}.attention.sliding_window_pattern", pattern)
