"""Multi-head latent attention: https://arxiv.org/abs/2405.04434, as in cpu_kernels.latent.

The cache holds one vector per token, of which every head has its own view: `k_b` turns a head's
query into one for that vector (its keys are never made), and `v_b` makes a head's values of the
weighted mean of vectors.
"""

from __future__ import annotations

from typing import Any

import torch

from gpu_backend.batch import BatchPlace
from gpu_backend.flash import attend
from gpu_backend.kv import KVPages
from gpu_backend.matrix import Rows
from gpu_backend.norm import rms_norm
from gpu_backend.rope import RopeTable


class LatentAttentionLayer:
    """A layer's weights, prepared. `weights` has the attributes of tiered.backend.LatentWeights."""

    def __init__(
        self, weights: Any, config: Any, index: int, rope: RopeTable, device: torch.device
    ) -> None:
        c, w = config.latent, weights
        self.config, self.rope, self.window = config, rope, config.window(index)
        self.q, self.kv_a, self.o = (matrix.load() for matrix in (w.q, w.kv_a, w.o))
        self.q_a = None if w.q_a is None else w.q_a.load()
        self.k_b, self.v_b = (matrix.load(config.num_heads) for matrix in (w.k_b, w.v_b))
        self.norm, self.q_a_norm, self.kv_a_norm = (
            None if vector is None else torch.tensor(vector, device=device)
            for vector in (w.norm, w.q_a_norm, w.kv_a_norm)
        )
        self.scale = float(config.query_scale or (c.nope_dim + c.rope_dim) ** -0.5)

    def project(
        self, kv: KVPages, index: int, arithmetic: Any, x: torch.Tensor, slots: torch.Tensor,
        rotation: torch.Tensor,
    ) -> tuple[torch.Tensor]:  # fmt: skip
        """Queries of norm(x), for the vectors that are kept at `slots`. See AttentionLayer."""
        c, eps = self.config.latent, self.config.norm_eps
        rows = Rows(rms_norm(x, self.norm, eps), arithmetic)
        latents, rotated = self.kv_a.multiply(rows).split([c.kv_rank, c.rope_dim], -1)
        rotated = self.rope.rotate(rotated[:, None], rotation)  # [num_tokens, 1, rope_dim]
        latents = rms_norm(latents, self.kv_a_norm, eps)[:, None]
        kv.append(index, slots, torch.cat([latents, rotated], -1))
        if self.q_a is not None:
            rows = Rows(rms_norm(self.q_a.multiply(rows), self.q_a_norm, eps), arithmetic)
        q = self.q.multiply(rows).unflatten(-1, (self.config.num_heads, -1)) * self.scale
        q, rotated = q.split([c.nope_dim, c.rope_dim], -1)
        return (torch.cat([self.k_b.multiply_heads(q), self.rope.rotate(rotated, rotation)], -1),)

    def places(self, place: BatchPlace) -> tuple[torch.Tensor, ...]:
        return place.slots, place.rotation(self.rope)

    def attend(self, q: torch.Tensor, kv: KVPages, index: int, place: BatchPlace) -> torch.Tensor:
        """The mean of the vectors that each row's heads see: float32 [num_tokens, num_heads,
        kv_rank]."""
        rank = self.config.latent.kv_rank
        out = torch.empty((*q.shape[:2], rank), device=q.device)
        for part in place.sequences:
            slots, mask = part.visible(self.window)
            keys = kv.keys(index, slots)  # [length, 1, kv_rank + rope_dim]
            out[part.rows] = attend(q[part.rows], keys, keys[..., :rank], mask)
        return out

    def finish(self, arithmetic: Any, x: torch.Tensor, out: torch.Tensor) -> tuple[()]:
        """x += the output of what was read."""
        values = self.v_b.multiply_heads(out).flatten(1)  # [num_tokens, num_heads * value_dim]
        x += self.o.multiply(Rows(values, arithmetic))
        return ()
