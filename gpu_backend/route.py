"""The router: norm, logits, a score for each expert, and the best `top_k` of them."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch

from gpu_backend.matrix import Rows
from gpu_backend.norm import rms_norm


class Routing(NamedTuple):
    experts: np.ndarray  # int32   [num_tokens, top_k], best first
    weights: np.ndarray  # float32 [num_tokens, top_k]


class RouterLayer:
    """See cpu_kernels.route.RouterLayer."""

    def __init__(self, weights: Any, config: Any, device: torch.device) -> None:
        self._norm = torch.tensor(weights.norm, device=device)
        self._router = weights.router.load()
        correction = weights.correction
        self._correction = None if correction is None else torch.tensor(correction, device=device)
        self._config = config

    def norm(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, self._norm, self._config.norm_eps)

    def choose(self, rows: Rows) -> Routing:
        """Comes to the host: this is where it waits for the device."""
        config, logits = self._config, self._router.multiply(rows)  # [num_tokens, num_experts]
        is_sigmoid = config.router_scoring == "sigmoid"
        scores = torch.sigmoid(logits) if is_sigmoid else torch.softmax(logits, -1)
        choices = scores if self._correction is None else scores + self._correction
        if config.expert_groups > 1:
            choices = self._best_groups(choices, num_best=2 if is_sigmoid else 1)
        # Stable: of equal scores the first, as everywhere.
        experts = choices.sort(dim=-1, descending=True, stable=True).indices[:, : config.top_k]
        weights = scores.gather(-1, experts)
        if config.normalize_top_k:
            weights = weights / weights.sum(-1, keepdim=True)
        weights = weights * config.routing_scale
        both = torch.stack([experts.float(), weights]).cpu().numpy()  # one copy, not two
        return Routing(both[0].astype(np.int32), both[1])

    def _best_groups(self, choices: torch.Tensor, num_best: int) -> torch.Tensor:
        """-inf for the experts of all but the best `used_groups` groups."""
        groups = choices.reshape(len(choices), self._config.expert_groups, -1)
        scores = groups.topk(min(num_best, groups.shape[-1]), dim=-1).values.sum(-1)
        ranked = scores.sort(dim=-1, descending=True, stable=True).indices
        dropped = ranked[:, self._config.used_groups :, None].expand(-1, -1, groups.shape[-1])
        return groups.scatter(1, dropped, float("-inf")).reshape(choices.shape)
