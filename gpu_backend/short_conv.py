"""A gated short convolution in the place of attention. https://arxiv.org/abs/2511.23404"""

from __future__ import annotations

from typing import Any

import torch

from gpu_backend.matrix import Rows
from gpu_backend.norm import rms_norm
from gpu_backend.recurrent import convolve, runs_of


class ConvLayer:
    """`weights` has the attributes of tiered.backend.ConvWeights; `number` counts such layers."""

    def __init__(self, weights: Any, config: Any, number: int, device: torch.device) -> None:
        self._eps, self._number = float(config.norm_eps), number
        self._gates, self._o = weights.gates.load(), weights.o.load()
        self._norm, self._conv = (
            torch.tensor(array, device=device) for array in (weights.norm, weights.conv)
        )

    def run(self, x: torch.Tensor, batch: Any, arithmetic: Any) -> None:
        """x += o(c * convolution(b * v)); each text's state goes on by its tokens."""
        rows = Rows(rms_norm(x, self._norm, self._eps), arithmetic)
        b, c, v = self._gates.multiply(rows).chunk(3, -1)
        gated, mixed = b * v, torch.empty_like(x)
        for run in runs_of(batch):
            history = run.of_layer(self._number).view(-1, x.shape[1])
            mixed[run.rows] = convolve(gated[run.rows], history, self._conv)
        x += self._o.multiply(Rows(c * mixed, arithmetic))
