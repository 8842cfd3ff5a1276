"""The memory of the KV cache: pages of keys and values on the device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

DTYPES = {"f32": torch.float32, "f16": torch.float16, "int8": torch.int8}
KEYS, VALUES = 0, 1


class KVShape(NamedTuple):
    """What a token keeps in a layer; no values: they are a part of its keys."""

    num_heads: int
    key_dim: int
    value_dim: int


class KVPages:
    """Keys and values of `num_pages` pages in each layer of `shapes`, on that layer's device; int8
    has a scale per token and head."""

    def __init__(
        self,
        shapes: Mapping[int, KVShape],
        num_pages: int,
        page_size: int,
        dtype: str,
        devices: Sequence[torch.device],
    ) -> None:
        if dtype not in DTYPES:
            raise ValueError(f"the KV cache is kept as f32, f16 or int8, not {dtype!r}")
        self.page_size, self.num_pages, self.dtype = page_size, num_pages, dtype
        length = num_pages * page_size
        self._data = {
            (layer, kind): torch.zeros(
                (length, shape.num_heads, size), dtype=DTYPES[dtype], device=devices[layer]
            )
            for layer, shape in shapes.items()
            for kind, size in ((KEYS, shape.key_dim), (VALUES, shape.value_dim))
            if size
        }
        self._scales = {
            key: torch.zeros((length, data.shape[1], 1), device=data.device)
            for key, data in self._data.items()
            if dtype == "int8"
        }

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (*self._data.values(), *self._scales.values()))

    def append(
        self, layer: int, at: torch.Tensor, keys: torch.Tensor, values: torch.Tensor | None = None
    ) -> None:
        """Keep float32 [num_tokens, heads, size] at `at` (int64: page * page_size + slot)."""
        self._put((layer, KEYS), at, keys)
        if values is not None:
            self._put((layer, VALUES), at, values)

    def keys(self, layer: int, at: torch.Tensor) -> torch.Tensor:
        """Those at `at`: float32 [len(at), heads, size]."""
        return self._get((layer, KEYS), at)

    def values(self, layer: int, at: torch.Tensor) -> torch.Tensor:
        return self._get((layer, VALUES), at)

    def _put(self, key: tuple[int, int], at: torch.Tensor, x: torch.Tensor) -> None:
        if self.dtype == "int8":
            scale = x.abs().amax(-1, keepdim=True) / 127
            self._scales[key][at] = scale
            x = torch.round(x / torch.where(scale > 0, scale, 1))
        elif self.dtype == "f16":  # what it cannot hold becomes its largest
            x = x.clamp(-65504.0, 65504.0)
        self._data[key][at] = x.to(DTYPES[self.dtype])

    def _get(self, key: tuple[int, int], at: torch.Tensor) -> torch.Tensor:
        x = self._data[key][at].float()
        return x * self._scales[key][at] if key in self._scales else x


def kv_pages(
    config: Any, num_pages: int, page_size: int, dtype: str, devices: Sequence[torch.device]
) -> KVPages:
    """Room for the keys and values of all layers of a model that have them; `devices`: by layer."""
    shapes = {layer: config.attention_shape(layer) for layer in config.attention_layers}
    is_latent = config.latent.kv_rank > 0
    sizes = {
        layer: KVShape(s.num_kv_heads, s.head_dim, 0 if is_latent else s.head_dim)
        for layer, s in shapes.items()
    }
    return KVPages(sizes, num_pages, page_size, dtype, devices)
