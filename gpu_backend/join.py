"""What a layer that drafts tokens begins with: see cpu_kernels.join."""

from __future__ import annotations

from typing import Any

import torch

from gpu_backend.matrix import Rows
from gpu_backend.norm import rms_norm


class JoinLayer:
    """`weights` has the attributes of tiered.backend.JoinWeights; its projection is a Matrix."""

    def __init__(self, weights: Any, config: Any, device: torch.device) -> None:
        size = config.hidden_size
        if tuple(weights.projection.shape) != (size, 2 * size):
            raise ValueError(
                f"the projection must have shape {(size, 2 * size)}, "
                f"not {tuple(weights.projection.shape)}"
            )
        self._embedding_norm, self._last_norm, self._hidden_norm = (
            torch.tensor(norm, device=device)
            for norm in (weights.embedding_norm, weights.last_norm, weights.hidden_norm)
        )
        self._projection, self._eps = weights.projection.load(), float(config.norm_eps)

    def run(self, x: torch.Tensor, hidden: torch.Tensor, arithmetic: Any) -> None:
        """x = projection @ [norm(x), norm(last_norm(hidden))], both float32 [num_tokens,
        hidden_size]."""
        if x.shape != hidden.shape:
            raise ValueError(f"x and hidden must be alike: {tuple(x.shape)}, {tuple(hidden.shape)}")
        left = rms_norm(x, self._embedding_norm, self._eps)
        right = rms_norm(hidden, self._last_norm, self._eps)
        right = rms_norm(right, self._hidden_norm, self._eps)
        joined = torch.cat([left, right], dim=-1)  # [num_tokens, 2 * hidden_size]
        x.copy_(self._projection.multiply(Rows(joined, arithmetic)))
