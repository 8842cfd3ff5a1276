"""Attention of a layer over the paged KV cache."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention

from gpu_backend.kv import KVPages
from gpu_backend.matrix import Rows
from gpu_backend.norm import rms_norm
from gpu_backend.rope import RopeTable


class AttentionLayer:
    """A layer's weights, prepared. `weights` and `config` are tiered's, or like them."""

    def __init__(self, weights: Any, config: Any, index: int, device: torch.device) -> None:
        self.config = config
        self.window: int = config.window(index)
        self.norm = torch.tensor(weights.norm, device=device)
        self.q, self.k, self.v, self.o = (
            matrix.load() for matrix in (weights.q, weights.k, weights.v, weights.o)
        )
        self.q_norm, self.k_norm = (
            None if norm is None else torch.tensor(norm, device=device)
            for norm in (weights.q_norm, weights.k_norm)
        )
        self.rope = RopeTable(config.rope, config.head_dim, device)

    def run(
        self, x: torch.Tensor, kv: KVPages, index: int, place: BatchPlace, arithmetic: Any
    ) -> None:
        """x += attention(norm(x)), float32 [num_tokens, hidden_size]."""
        config, heads = self.config, (len(x), -1, self.config.head_dim)
        rows = Rows(rms_norm(x, self.norm, config.norm_eps), arithmetic)
        q, k, v = (matrix.multiply(rows) for matrix in (self.q, self.k, self.v))
        if config.qk_norm == "full":
            q, k = self._norm(q, k)
        if config.clip_qkv:
            q, k, v = (t.clamp(-config.clip_qkv, config.clip_qkv) for t in (q, k, v))
        q, k, v = (t.reshape(heads) for t in (q, k, v))
        if config.qk_norm == "head":
            q, k = self._norm(q, k)
        rotation = place.rotation(self.rope)
        q, k = self.rope.rotate(q, rotation), self.rope.rotate(k, rotation)
        kv.append(index, place.slots, k, v)
        out = torch.empty_like(q)
        for part in place.sequences:
            keys, values = kv.read(index, part.slots)  # [length, kv_heads, head_dim]
            out[part.rows] = scaled_dot_product_attention(
                q[part.rows].transpose(0, 1)[None],
                keys.transpose(0, 1)[None],
                values.transpose(0, 1)[None],
                attn_mask=part.mask(self.window),
                enable_gqa=config.num_heads != config.num_kv_heads,
            )[0].transpose(0, 1)
        x += self.o.multiply(Rows(out.reshape(len(x), -1), arithmetic))

    def _norm(self, q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        assert self.q_norm is not None and self.k_norm is not None
        eps = self.config.norm_eps
        return rms_norm(q, self.q_norm, eps), rms_norm(k, self.k_norm, eps)


class SequencePlace:
    """One sequence's rows of a batch, and where its keys and values are."""

    def __init__(
        self, rows: np.ndarray, positions: np.ndarray, slots: np.ndarray, device: torch.device
    ) -> None:
        self.rows = torch.from_numpy(rows).to(device)
        self.slots = torch.from_numpy(slots).to(device)  # int64 [length], by position
        self._positions = torch.from_numpy(positions).to(device)
        self._last_only = len(rows) == 1

    def mask(self, window: int) -> torch.Tensor | None:
        """Which positions each row attends to: bool [num_rows, length]; None: all."""
        length = len(self.slots)
        if self._last_only and not (window and length > window):
            return None
        at = torch.arange(length, device=self.slots.device)
        mask = at <= self._positions[:, None]
        return mask & (at > self._positions[:, None] - window) if window else mask


class BatchPlace:
    """Where a batch's tokens are in the KV cache; the same for all layers of a forward pass."""

    def __init__(self, batch: Any, page_size: int, device: torch.device) -> None:
        self._positions = batch.positions
        self._rotation: torch.Tensor | None = None
        tables = batch.page_tables.astype(np.int64)
        pages = tables[batch.sequences, batch.positions // page_size]
        slots = pages * page_size + batch.positions % page_size
        self.slots = torch.from_numpy(slots).to(device)
        self.sequences = []
        for sequence in np.unique(batch.sequences):
            rows = np.flatnonzero(batch.sequences == sequence)
            positions = batch.positions[rows].astype(np.int64)
            at = np.arange(positions.max() + 1)
            known = tables[sequence, at // page_size] * page_size + at % page_size
            self.sequences.append(SequencePlace(rows, positions, known, device))

    def rotation(self, rope: RopeTable) -> torch.Tensor:
        """The first layer's rotation serves all layers: they share one kind of rope."""
        if self._rotation is None:
            self._rotation = rope.rotation(self._positions)
        return self._rotation
