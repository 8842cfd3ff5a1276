"""A layer's attention: norm, projections, rope, KV cache, attention, output."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch

from gpu_backend.batch import BatchPlace
from gpu_backend.flash import attend
from gpu_backend.graphs import Graphs
from gpu_backend.kv import KVPages
from gpu_backend.latent import LatentAttentionLayer
from gpu_backend.matrix import Rows
from gpu_backend.norm import norm_rows, rms_norm
from gpu_backend.rope import RopeTable


class AttentionLayer:
    """A layer's weights, prepared. `weights` and `config` are tiered's, or like them."""

    def __init__(
        self, weights: Any, config: Any, index: int, rope: RopeTable, device: torch.device
    ) -> None:
        shape, w = config.attention_shape(index), weights
        self.config, self.rope, self.head_dim = config, rope, shape.head_dim
        self.window: int = config.window(index)
        self.temperature_step = config.temperature_step if index in config.full_layers else 0
        self.q, self.k, self.v, self.o = (matrix.load() for matrix in (w.q, w.k, w.v, w.o))
        self.gate = None if w.gate is None else w.gate.load()
        self.norm = torch.tensor(w.norm, device=device)
        self.q_norm, self.k_norm, self.sinks, self.out_norm = (
            None if vector is None else torch.tensor(vector, device=device)
            for vector in (w.q_norm, w.k_norm, w.sinks, w.out_norm)
        )
        self.scale = float(config.query_scale or shape.head_dim**-0.5)

    def project(
        self, kv: KVPages, index: int, arithmetic: Any, x: torch.Tensor, slots: torch.Tensor,
        rotation: torch.Tensor, *scale: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:  # fmt: skip
        """Queries of norm(x), whose keys and values are kept at `slots`, and what gates the
        output, if anything does. What is after `x` comes from `places`."""
        rows = Rows(norm_rows(x, self.norm, self.config.norm_eps), arithmetic)
        q, k, v = self._heads(rows)
        q = self.rope.rotate(q, rotation) * (scale[0][:, None, None] if scale else self.scale)
        kv.append(index, slots, self.rope.rotate(k, rotation), v)
        return (q,) if self.gate is None else (q, torch.sigmoid(self.gate.multiply(rows)))

    def places(self, place: BatchPlace) -> tuple[torch.Tensor, ...]:
        """What of a batch is on the device: where its tokens go, their angles and, where there are
        temperatures, what their queries are multiplied with."""
        both = place.slots, place.rotation(self.rope)
        if not self.temperature_step:
            return both
        name = "temperatures", self.temperature_step, self.config.temperature, self.scale
        return (*both, place.scales(name, self._query_scales(place.positions)))

    def attend(self, q: torch.Tensor, kv: KVPages, index: int, place: BatchPlace) -> torch.Tensor:
        """What each row reads of what it may see: float32 [num_tokens, num_heads, head_dim]."""
        out = torch.empty_like(q)
        for part in place.sequences:
            slots, mask = part.visible(self.window, self.config.chunked_attention)
            keys, values = kv.keys(index, slots), kv.values(index, slots)
            out[part.rows] = attend(q[part.rows], keys, values, mask, self.sinks)
        return out

    def finish(
        self, arithmetic: Any, x: torch.Tensor, out: torch.Tensor, *gate: torch.Tensor
    ) -> tuple[()]:
        """x += the output of what was read."""
        out = out.reshape(len(x), -1)
        if gate:
            out = out * gate[0]
        y = self.o.multiply(Rows(out, arithmetic))
        x += y if self.out_norm is None else rms_norm(y, self.out_norm, self.config.norm_eps)
        return ()

    def _heads(self, rows: Rows) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries, keys and values, float32 [num_tokens, heads, head_dim]; not yet rotated."""
        config, eps = self.config, self.config.norm_eps
        q, k, v = (matrix.multiply(rows) for matrix in (self.q, self.k, self.v))
        is_full = config.qk_norm == "full"
        if is_full and self.q_norm is not None:
            q, k = rms_norm(q, self.q_norm, eps), rms_norm(k, self.k_norm, eps)
        q, k, v = (t.reshape(len(t), -1, self.head_dim) for t in (q, k, v))
        if not is_full and self.q_norm is not None:
            q, k = rms_norm(q, self.q_norm, eps), rms_norm(k, self.k_norm, eps)
        if config.value_norm:
            v = rms_norm(v, None, eps)
        if config.clip_qkv:
            q, k, v = (t.clamp(-config.clip_qkv, config.clip_qkv) for t in (q, k, v))
        return q, k, v

    def _query_scales(self, positions: np.ndarray) -> np.ndarray:
        """What queries are multiplied with, the more the further on:
        https://arxiv.org/abs/2501.19399."""
        growth = np.log1p((positions + 1) // self.temperature_step)
        scales: np.ndarray = self.scale * (self.config.temperature * growth + 1)
        return scales


class Attention:
    """All that attention layers share: tables of angles, and the batch at hand."""

    def __init__(self, device: torch.device, arithmetic: Any, graphs: Graphs) -> None:
        self._device, self._arithmetic, self._graphs = device, arithmetic, graphs
        self._ropes: dict[Any, RopeTable] = {}
        self._batch: tuple[Any, BatchPlace] | None = None

    def layer(self, weights: Any, config: Any, index: int) -> AttentionLayer:
        shape = config.attention_shape(index)
        rope = self.rope(shape.rope, shape.head_dim)
        return AttentionLayer(weights, config, index, rope, self._device)

    def latent_layer(self, weights: Any, config: Any, index: int) -> LatentAttentionLayer:
        # What rotates is as wide as the rope says.
        rope = self.rope(config.rope, config.latent.rope_dim)
        return LatentAttentionLayer(weights, config, index, rope, self._device)

    def rope(self, rope: Any, head_dim: int) -> RopeTable:
        key = rope, head_dim
        if key not in self._ropes:
            self._ropes[key] = RopeTable(rope, head_dim)
        return self._ropes[key]

    def run(self, x: torch.Tensor, layer: Any, kv: KVPages, index: int, batch: Any) -> None:
        """x += attention(norm(x)); appends keys and values."""
        if self._batch is None or self._batch[0] is not batch:
            self._batch = batch, BatchPlace(batch, kv, self._device, self._graphs.buffers)
        place = self._batch[1]
        project = partial(layer.project, kv, index, self._arithmetic)
        q, *gate = self._graphs.run(("project", layer, kv), project, x, *layer.places(place))
        out = layer.attend(q, kv, index, place)
        finish = partial(layer.finish, self._arithmetic)
        self._graphs.run(("finish", layer), finish, x, out, *gate)
