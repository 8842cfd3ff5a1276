"""The router: norm, logits, softmax over all experts, and the best `top_k` of them."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch

from gpu_backend.matrix import Matrix, Rows
from gpu_backend.norm import rms_norm


class Routing(NamedTuple):
    experts: np.ndarray  # int32   [num_tokens, top_k], best first
    weights: np.ndarray  # float32 [num_tokens, top_k]


class RouterLayer:
    def __init__(self, norm: np.ndarray, router: Matrix, config: Any, device: torch.device) -> None:
        self._norm = torch.tensor(norm, device=device)
        self._router = router.load()
        self._eps: float = config.norm_eps
        self._top_k: int = config.top_k
        self._normalize: bool = config.normalize_top_k

    def norm(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, self._norm, self._eps)

    def choose(self, rows: Rows) -> Routing:
        """Comes to the host: this is where it waits for the device."""
        scores = torch.softmax(self._router.multiply(rows), -1)  # [num_tokens, num_experts]
        # Stable: of equal scores the first, as everywhere.
        ranked = scores.sort(dim=-1, descending=True, stable=True)
        weights, experts = (t[:, : self._top_k] for t in ranked)
        if self._normalize:
            weights = weights / weights.sum(-1, keepdim=True)
        both = torch.stack([experts.float(), weights]).cpu().numpy()  # one copy, not two
        return Routing(both[0].astype(np.int32), both[1])
