"""What a layer with norms after its branches adds: see cpu_kernels.merge."""

from __future__ import annotations

from typing import Any

import torch

from gpu_backend.norm import rms_norm


class MergeLayer:
    """`weights` has the attributes of tiered.backend.MergeWeights."""

    def __init__(self, weights: Any, config: Any, device: torch.device) -> None:
        self._dense_norm, self._routed_norm, self._norm = (
            torch.tensor(norm, device=device)
            for norm in (weights.dense_norm, weights.routed_norm, weights.norm)
        )
        self._eps, self._scale = float(config.norm_eps), float(weights.scale)

    def run(self, x: torch.Tensor, dense: torch.Tensor, routed: torch.Tensor) -> None:
        """x = (x + norm(norm(dense) + norm(routed))) * scale."""
        both = rms_norm(dense, self._dense_norm, self._eps)
        both = both + rms_norm(routed, self._routed_norm, self._eps)
        x += rms_norm(both, self._norm, self._eps)
        x *= self._scale
