"""The router: norm, logits, a score for each expert, and the best `top_k` of them."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch

from gpu_backend.matrix import Rows
from gpu_backend.norm import norm_rows, rms_norm

SCORINGS = ("softmax", "sigmoid", "sparsemixer")


class Routing(NamedTuple):
    experts: np.ndarray  # int32   [num_tokens, top_k], best first
    weights: np.ndarray  # float32 [num_tokens, top_k]


def on_host(chosen: torch.Tensor) -> Routing:
    """This is where the host waits for the device."""
    experts, weights = chosen.cpu().numpy()
    return Routing(experts.astype(np.int32), np.array(weights))


class RouterLayer:
    """See cpu_kernels.route.RouterLayer."""

    def __init__(self, weights: Any, config: Any, device: torch.device) -> None:
        if config.router_scoring not in SCORINGS:
            raise ValueError(
                f"router_scoring must be one of {', '.join(SCORINGS)}, "
                f"not {config.router_scoring!r}"
            )
        self._router = weights.router.load()
        self._norm, self._own_norm, self._correction, self._scales = (
            None if vector is None else torch.tensor(vector, device=device)
            for vector in (weights.norm, weights.own_norm, weights.correction, weights.scales)
        )
        self._config = config

    def norm(self, x: torch.Tensor) -> torch.Tensor:
        assert self._norm is not None
        return norm_rows(x, self._norm, self._config.norm_eps)

    def choose(self, x: torch.Tensor, rows: Rows, arithmetic: Any) -> Routing:
        """What `rows`, or what a norm of its own makes of `x`, is routed to."""
        return on_host(self.chosen(x, rows, arithmetic))

    def normed_and_chosen(
        self, arithmetic: Any, x: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """norm(x), and what `chosen` makes of it."""
        h = self.norm(x)
        return h, self.chosen(x, Rows(h, arithmetic), arithmetic)

    def chosen(self, x: torch.Tensor, rows: Rows, arithmetic: Any) -> torch.Tensor:
        """The same on the device, for `on_host`: experts and weights, [2, num_tokens, top_k]."""
        if self._own_norm is not None:
            rows = Rows(rms_norm(x, self._own_norm, self._config.norm_eps), arithmetic)
        logits = self._router.multiply(rows)  # [num_tokens, num_experts]
        is_mixed = self._config.router_scoring == "sparsemixer"
        experts, weights = self._mix(logits) if is_mixed else self._best(logits)
        return torch.stack([experts.float(), weights])  # one copy to the host, not two

    def _best(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        config, is_sigmoid = self._config, self._config.router_scoring == "sigmoid"
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
        return experts, weights if self._scales is None else weights * self._scales[experts]

    def _best_groups(self, choices: torch.Tensor, num_best: int) -> torch.Tensor:
        """-inf for the experts of all but the best `used_groups` groups."""
        groups = choices.reshape(len(choices), self._config.expert_groups, -1)
        scores = groups.topk(min(num_best, groups.shape[-1]), dim=-1).values.sum(-1)
        ranked = scores.sort(dim=-1, descending=True, stable=True).indices
        dropped = ranked[:, self._config.used_groups :, None].expand(-1, -1, groups.shape[-1])
        return groups.scatter(1, dropped, float("-inf")).reshape(choices.shape)

    def _mix(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """SparseMixer: each one's weight is its softmax among those left whose logit is at most
        2 * jitter below, as a share of the larger of the two. https://arxiv.org/abs/2409.12136"""
        left, experts, weights = logits, [], []
        for _ in range(self._config.top_k):
            best = left.argmax(-1, keepdim=True)
            most = left.gather(-1, best)
            # Written so that what is not a number counts, and shows.
            below = (most - left) / torch.maximum(left.abs(), most)
            near = (left != float("-inf")) & ~(below > 2 * self._config.router_jitter)
            total = torch.where(near, torch.exp(left - most), 0.0).sum(-1, keepdim=True)
            experts.append(best)
            weights.append(1 / total)
            left = left.scatter(-1, best, float("-inf"))
        return torch.cat(experts, -1), torch.cat(weights, -1)
