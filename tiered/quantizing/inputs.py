"""What a calibration text puts into an expert's matrices, and how much each column matters."""

from __future__ import annotations

from functools import cached_property

import numpy as np

from tiered.config import ModelConfig
from tiered.quantizing.rounding import Hessian, damped
from tiered.quantizing.walk import Given


class Inputs:
    """`rows` is float32 [num_tokens, columns], `weights` float32 [num_tokens]: what the results are
    multiplied with."""

    def __init__(self, rows: np.ndarray, weights: np.ndarray) -> None:
        self.rows, self.weights = rows, weights

    def divided(self, scale: np.ndarray) -> Inputs:
        return Inputs(self.rows / scale, self.weights)

    @cached_property
    def importance(self) -> np.ndarray:
        """How much a column's squared error matters: float32 [columns]."""
        moments = np.square(self.weights) @ np.square(self.rows)
        return damped(moments / max(float(np.square(self.weights).sum()), 1e-30))

    @cached_property
    def hessian(self) -> Hessian:
        return Hessian(self.rows, self.weights)


def expert_inputs(given: Given, expert: int, fewest: int) -> tuple[Inputs, int]:
    """(what an expert gets, how many tokens of it were routed there).

    An expert that the text chose for fewer than `fewest` tokens gets others of the layer's, too,
    evenly taken, as if they had been routed there with the least weight of all.
    """
    chosen = given.experts == expert
    own, others = np.flatnonzero(chosen), np.flatnonzero(~chosen)
    missing = min(max(fewest - len(own), 0), len(others))
    more = others[np.linspace(0, len(others) - 1, missing).astype(np.int64)]
    weights = np.concatenate(
        [given.weights[own], np.full(missing, np.abs(given.weights).min(), np.float32)]
    )
    return Inputs(given.inputs[given.rows[np.concatenate([own, more])]], weights), len(own)


def activated(config: ModelConfig, gate: np.ndarray, up: np.ndarray) -> np.ndarray:
    """What goes into the last matrix of an expert: see cpu_kernels.gating."""
    result: np.ndarray
    if config.activation == "gelu_tanh":
        inner = np.float32(np.sqrt(2 / np.pi)) * (gate + np.float32(0.044715) * gate**3)
        result = np.float32(0.5) * gate * (1 + np.tanh(inner)) * up
        return result
    slope, offset = np.float32(1), np.float32(0)
    if config.activation == "clamped_silu":
        limit = np.float32(config.activation_limit)
        gate, up = np.minimum(gate, limit), np.clip(up, -limit, limit)
        slope, offset = np.float32(1.702), np.float32(1)
    result = gate / (1 + np.exp(-slope * gate)) * (up + offset)
    return result
