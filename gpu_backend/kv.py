"""The memory of the KV cache: pages of keys and values on the device."""

from __future__ import annotations

import torch

DTYPES = {"f32": torch.float32, "f16": torch.float16, "int8": torch.int8}
KEYS, VALUES = 0, 1


class KVPages:
    """Keys and values of `num_pages` pages in each layer; int8 has a scale per token and head."""

    def __init__(
        self,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        num_pages: int,
        page_size: int,
        dtype: str,
        device: torch.device,
    ) -> None:
        if dtype not in DTYPES:
            raise ValueError(f"the KV cache is kept as f32, f16 or int8, not {dtype!r}")
        self.page_size, self.num_pages, self.dtype = page_size, num_pages, dtype
        shape = 2, num_layers, num_pages * page_size, num_kv_heads
        self._data = torch.zeros((*shape, head_dim), dtype=DTYPES[dtype], device=device)
        self._scales = None
        if dtype == "int8":
            self._scales = torch.zeros((*shape, 1), device=device)

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (self._data, self._scales) if t is not None)

    def append(
        self, layer: int, at: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> None:
        """Keep float32 [num_tokens, heads, head_dim] at `at` (int64: page * page_size + slot)."""
        for kind, x in ((KEYS, keys), (VALUES, values)):
            if self._scales is not None:
                scale = x.abs().amax(-1, keepdim=True) / 127
                self._scales[kind, layer, at] = scale
                x = torch.round(x / torch.where(scale > 0, scale, 1))
            self._data[kind, layer, at] = x.to(self._data.dtype)

    def read(self, layer: int, at: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values at `at`: float32 [len(at), heads, head_dim]."""
        both = self._data[:, layer, at].float()
        if self._scales is not None:
            both = both * self._scales[:, layer, at]
        return both[KEYS], both[VALUES]
