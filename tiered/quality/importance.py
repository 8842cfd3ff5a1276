"""Importance: which experts of a layer a text needs most, by what passes through the layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from tiered.backend import Backend
from tiered.config import ModelConfig
from tiered.quality.layer_tap import Heard, LayerTap

Scores = np.ndarray  # float64 [num_layers, num_experts]; more is more important


class Meter(LayerTap):
    """Adds up what there is to combine: float64 [num_layers, num_experts] each."""

    def __init__(self, backend: Backend, config: ModelConfig) -> None:
        super().__init__(backend)
        shape = config.num_layers, config.num_experts
        self.count = np.zeros(shape)  # tokens that were routed there
        self.activation = np.zeros(shape)  # routing weight times the output's length
        self.loss = np.zeros(shape)  # squared change of the layer's output without the expert
        self._normalize = config.normalize_top_k

    def hear(self, heard: Heard) -> None:
        lengths = np.linalg.norm(heard.out, axis=2)
        losses = leave_one_out(heard.out, heard.weights, self._normalize)
        for sums, values in (
            (self.count, (heard.weights > 0).astype(np.float64)),
            (self.activation, heard.weights * lengths),
            (self.loss, losses),
        ):
            np.add.at(sums[heard.layer], heard.experts, values)


def leave_one_out(out: np.ndarray, weights: np.ndarray, normalize: bool) -> np.ndarray:
    """How far a token's combined output moves without each of its experts, the others' weights
    scaled to the same sum if the model normalizes: squared, float64 [num_tokens, top_k]."""
    parts = weights[..., None].astype(np.float64) * out
    whole = parts.sum(axis=1, keepdims=True)
    left = whole - parts
    if normalize:
        total = weights.sum(axis=1, keepdims=True, dtype=np.float64)
        rest = total - weights
        left *= (total / np.where(rest > 1e-6 * total, rest, np.inf))[..., None]
    moved: np.ndarray = np.square(whole - left).sum(axis=2)
    return moved


CRITERIA: Mapping[str, Callable[[Meter], Scores]] = {
    # Tokens of the text that were routed to the expert.
    "frequency": lambda meter: meter.count,
    # Mean of routing weight times output length over its tokens: arXiv 2510.13999.
    "reap": lambda meter: meter.activation / np.maximum(meter.count, 1),
    # Squared error of the layer's output, over all tokens, if it alone were missing.
    "loss": lambda meter: meter.loss,
}


def random_scores(config: ModelConfig, seed: int) -> Scores:
    return np.random.default_rng(seed).random((config.num_layers, config.num_experts))


def best_experts(scores: Scores, layers: Sequence[int], num_kept: int) -> dict[int, list[int]]:
    """The `num_kept` best of each layer, in ascending order; of equal ones the first."""
    order = np.argsort(-scores, axis=1, kind="stable")[:, :num_kept]
    return {layer: sorted(order[layer].tolist()) for layer in layers}
