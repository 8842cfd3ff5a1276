"""What most tiny checkpoints say about attention."""

from __future__ import annotations

from typing import Any


def write_attention(writer: Any, s: dict[str, int], rope_dim: int | None = None) -> None:
    writer.add_head_count_kv(s["kv_heads"])
    writer.add_key_length(s["head_dim"])
    writer.add_value_length(s["head_dim"])
    writer.add_rope_dimension_count(rope_dim or s["head_dim"])
