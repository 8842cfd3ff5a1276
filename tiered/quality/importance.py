"""Importance: which experts of a layer a text needs most, by what passes through the layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import numpy as np

from tiered.backend import Array, Backend, Batch
from tiered.config import ModelConfig
from tiered.engine import Engine
from tiered.experts import Routing
from tiered.quality.windows import cut

WINDOW = 512  # tokens of the text that are read together

Scores = np.ndarray  # float64 [num_layers, num_experts]; more is more important


class Meter:
    """A backend that adds up, per layer and expert, what it is asked to combine.

    Everything else it hands on. Sums are float64 [num_layers, num_experts].
    """

    def __init__(self, backend: Backend, config: ModelConfig) -> None:
        shape = config.num_layers, config.num_experts
        self.count = np.zeros(shape)  # tokens that were routed there
        self.activation = np.zeros(shape)  # routing weight times the output's length
        self.loss = np.zeros(shape)  # squared change of the layer's output without the expert
        self._backend = backend
        self._normalize = config.normalize_top_k
        self._layer = 0
        self._experts = np.zeros((0, 0), np.int32)  # [num_tokens, top_k], of the latest routing

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def attention(self, x: Array, layer: Any, kv: Any, index: int, batch: Batch) -> None:
        self._layer = index
        self._backend.attention(x, layer, kv, index, batch)

    def route(self, x: Array, layer: Any) -> tuple[Array, Routing]:
        h, routing = self._backend.route(x, layer)
        self._experts = routing.experts
        return h, routing

    def combine(self, x: Array, out: Array, weights: np.ndarray) -> None:
        self._add(np.asarray(out).reshape(*weights.shape, -1), weights)
        self._backend.combine(x, out, weights)

    def _add(self, out: np.ndarray, weights: np.ndarray) -> None:
        """`out` is float32 [num_tokens, top_k, hidden_size]."""
        lengths = np.linalg.norm(out, axis=2)
        losses = leave_one_out(out, weights, self._normalize)
        for sums, values in (
            (self.count, np.ones_like(weights)),
            (self.activation, weights * lengths),
            (self.loss, losses),
        ):
            np.add.at(sums[self._layer], self._experts, values)


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


def measure(
    engine: Engine, ids: Sequence[int], progress: Callable[[int, int], None]
) -> Mapping[str, Scores]:
    """Scores by every criterion. `engine` has a Meter for its backend."""
    meter = cast(Meter, engine.backend)
    size = min(WINDOW, engine.context)
    windows = cut(len(ids), size, size)
    for done, window in enumerate(windows):
        progress(done, len(windows))
        part = ids[window.begin : window.end]
        for _ in engine.logits_by_rows(part, start=len(part) - 1):
            pass
    progress(len(windows), len(windows))
    return {name: scores(meter) for name, scores in CRITERIA.items()}


def random_scores(config: ModelConfig, seed: int) -> Scores:
    return np.random.default_rng(seed).random((config.num_layers, config.num_experts))


def best_experts(scores: Scores, layers: Sequence[int], num_kept: int) -> dict[int, list[int]]:
    """The `num_kept` best of each layer, in ascending order; of equal ones the first."""
    order = np.argsort(-scores, axis=1, kind="stable")[:, :num_kept]
    return {layer: sorted(order[layer].tolist()) for layer in layers}
