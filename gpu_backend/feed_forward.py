"""Dense feed-forward: the whole of a dense layer, or the shared expert of a sparse one."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from gpu_backend.gating import activate, check_activation
from gpu_backend.matrix import Rows
from gpu_backend.norm import norm_rows


class FeedForwardLayer:
    def __init__(
        self, weights: Any, config: Any, norm: np.ndarray | None, device: torch.device
    ) -> None:
        check_activation(config.activation)
        self._gate, self._up, self._down = (
            matrix.load() for matrix in (weights.gate, weights.up, weights.down)
        )
        self._scale = None if weights.scale is None else weights.scale.load()
        self._norm = None if norm is None else torch.tensor(norm, device=device)
        self._config = config

    def normed(self, x: torch.Tensor) -> torch.Tensor:
        if self._norm is None:
            raise ValueError("this feed-forward was prepared without a norm: give it h")
        return norm_rows(x, self._norm, self._config.norm_eps)

    def add(self, arithmetic: Any, into: torch.Tensor, h: torch.Tensor) -> tuple[()]:
        """into += ffn(h)"""
        into += self.run(Rows(h, arithmetic), arithmetic)
        return ()

    def add_normed(self, arithmetic: Any, into: torch.Tensor, x: torch.Tensor) -> tuple[()]:
        """into += ffn(norm(x)); `into` may be x."""
        return self.add(arithmetic, into, self.normed(x))

    def run(self, rows: Rows, arithmetic: Any) -> torch.Tensor:
        """ffn(h), times the sigmoid of its own gate if it has one: [num_tokens, hidden_size]."""
        c, gate, up = self._config, self._gate.multiply(rows), self._up.multiply(rows)
        inner = activate(c.activation, c.activation_limit, gate, up)
        y = self._down.multiply(Rows(inner, arithmetic))
        return y if self._scale is None else y * torch.sigmoid(self._scale.multiply(rows))
