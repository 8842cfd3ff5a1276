"""What a token's keys and values take in each layer. Knows nothing of torch."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

VALUE_BYTES = {"f32": 4, "f16": 2, "int8": 1}
SCALE_BYTES = 4  # of a token's head, where values are int8
ALIGNMENT = 16


class KVShape(NamedTuple):
    """What a token keeps in a layer; no values: they are a part of its keys."""

    num_heads: int
    key_dim: int
    value_dim: int

    def token_bytes(self, dtype: str) -> int:
        sizes = [size for size in (self.key_dim, self.value_dim) if size]
        scales = len(sizes) * SCALE_BYTES if dtype == "int8" else 0
        nbytes = self.num_heads * (sum(sizes) * VALUE_BYTES[dtype] + scales)
        return -(-nbytes // ALIGNMENT) * ALIGNMENT


def kv_shapes(config: Any) -> dict[int, KVShape]:
    """By layer, of those that have keys. `config` is tiered's, or like it."""
    is_latent = config.latent.kv_rank > 0
    shapes = {layer: config.attention_shape(layer) for layer in config.attention_layers}
    return {
        layer: KVShape(s.num_kv_heads, s.head_dim, 0 if is_latent else s.head_dim)
        for layer, s in shapes.items()
    }


def token_bytes(shapes: Iterable[KVShape], dtype: str) -> int:
    """Of a token in all these layers."""
    return sum(shape.token_bytes(dtype) for shape in shapes)
