"""The last norm and the output head."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from gpu_backend.gating import soft_cap
from gpu_backend.matrix import Matrix, Rows
from gpu_backend.norm import norm_rows


class OutputLayer:
    def __init__(self, norm: np.ndarray, head: Matrix, config: Any, device: torch.device) -> None:
        self._norm, self._head = torch.tensor(norm, device=device), head.load()
        self._eps, self._cap = float(config.norm_eps), float(config.logit_softcap)

    def run(self, x: torch.Tensor, arithmetic: Any) -> torch.Tensor:
        """Logits of every row of x: float32 [num_rows, vocab_size]."""
        logits = self._head.multiply(Rows(norm_rows(x, self._norm, self._eps), arithmetic))
        return soft_cap(logits, self._cap) if self._cap else logits
