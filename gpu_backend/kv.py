"""The memory of the KV cache: pages of keys and values on the device.

All that a card keeps of a token lies together, layer by layer; a page is `page_size` tokens. Page 0
comes last, so that few pages take only the end of the memory, whose beginning may have expert
slots: see gpu_backend.slots.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from gpu_backend.kv_shapes import SCALE_BYTES, VALUE_BYTES, KVShape, kv_shapes, token_bytes

DTYPES = {"f32": torch.float32, "f16": torch.float16, "int8": torch.int8}
KEYS, VALUES = 0, 1


class KVMemory(NamedTuple):
    """uint8 on a card, room for all pages of its layers."""

    data: torch.Tensor
    layers: Sequence[int]


class KVPages:
    """Keys and values of `num_pages` pages in each layer of `shapes`, in the memory of its card;
    int8 has a scale per token and head."""

    def __init__(
        self,
        shapes: Mapping[int, KVShape],
        num_pages: int,
        page_size: int,
        dtype: str,
        memories: Sequence[KVMemory],
    ) -> None:
        if dtype not in DTYPES:
            raise ValueError(f"the KV cache is kept as f32, f16 or int8, not {dtype!r}")
        self.page_size, self.num_pages, self.dtype = page_size, num_pages, dtype
        self.nbytes = sum(memory.data.numel() for memory in memories)
        self._data: dict[tuple[int, int], torch.Tensor] = {}
        self._scales: dict[tuple[int, int], torch.Tensor] = {}
        for memory in memories:
            self._lay_out(memory, {layer: shapes[layer] for layer in memory.layers})

    def _lay_out(self, memory: KVMemory, shapes: Mapping[int, KVShape]) -> None:
        length, begin = self.num_pages * self.page_size, 0
        stride = token_bytes(shapes.values(), self.dtype)
        assert memory.data.numel() == length * stride

        def view(at: int, heads: int, size: int, dtype: torch.dtype) -> torch.Tensor:
            """[length, heads, size], a token's values `at` bytes into what it has."""
            nbytes = dtype.itemsize
            typed = memory.data.view(dtype)
            offset = typed.storage_offset() + at // nbytes
            return typed.as_strided((length, heads, size), (stride // nbytes, size, 1), offset)

        for layer, shape in shapes.items():
            at = begin
            # Scales first: they are aligned to four bytes.
            kinds = [(KEYS, shape.key_dim), (VALUES, shape.value_dim)]
            for kind, size in kinds if self.dtype == "int8" else ():
                if size:
                    self._scales[layer, kind] = view(at, shape.num_heads, 1, torch.float32)
                    at += shape.num_heads * SCALE_BYTES
            for kind, size in kinds:
                if size:
                    self._data[layer, kind] = view(at, shape.num_heads, size, DTYPES[self.dtype])
                    at += shape.num_heads * size * VALUE_BYTES[self.dtype]
            begin += shape.token_bytes(self.dtype)

    def places(self, pages: np.ndarray, slots: np.ndarray) -> np.ndarray:
        """Where tokens are that lie in these slots of these pages: int64, for the calls below."""
        places: np.ndarray = (self.num_pages - 1 - pages) * self.page_size + slots
        return places

    def append(
        self, layer: int, at: torch.Tensor, keys: torch.Tensor, values: torch.Tensor | None = None
    ) -> None:
        """Keep float32 [num_tokens, heads, size] at `at` (int64: see `places`)."""
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
    config: Any, num_pages: int, page_size: int, dtype: str, cards: Sequence[Any]
) -> KVPages:
    """Room for the keys and values of all layers of a model that have them. `cards`: the backend
    of each layer, which has the memory."""
    shapes = kv_shapes(config)
    memories = []
    for card in dict.fromkeys(cards):
        layers = [layer for layer in shapes if cards[layer] is card]
        nbytes = num_pages * page_size * token_bytes((shapes[layer] for layer in layers), dtype)
        memories.append(KVMemory(card.kv_memory(nbytes), layers))
    return KVPages(shapes, num_pages, page_size, dtype, memories)
