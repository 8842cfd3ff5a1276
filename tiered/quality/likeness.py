"""Likeness: how near what one expert of a layer says is to what another says of the same tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tiered.backend import Array, Backend
from tiered.config import ModelConfig
from tiered.experts import Routing
from tiered.quality.importance import Meter
from tiered.quality.layer_tap import Heard

TOKENS = 512  # whose chosen experts are computed at once, as far as memory goes


class LikenessMeter(Meter):
    """A meter for which every expert computes every token.

    Those that the router did not choose have weight 0, so that the model says what it always says,
    up to rounding.
    """

    def __init__(self, backend: Backend, config: ModelConfig) -> None:
        """ValueError for a model that weights what experts get: those of weight 0 hear nothing."""
        if config.weighted_inputs:
            raise ValueError(
                f"the experts of {config.model_type} get weighted inputs: what the others would "
                "say cannot be measured; prune without --merge"
            )
        super().__init__(backend, config)
        shape = config.num_layers, config.num_experts, config.num_experts
        self.products = np.zeros(shape)  # of outputs, summed over tokens

    def route(self, x: Array, layer: Any) -> tuple[Array, Routing]:
        h, routing = super().route(x, layer)
        whole = with_everyone(routing, self.products.shape[1])
        self._experts = whole.experts
        return h, whole

    def hear(self, heard: Heard) -> None:
        super().hear(heard)
        said = np.empty_like(heard.out)  # in the order of experts
        said[np.arange(len(said))[:, None], heard.experts] = heard.out
        rows = said.swapaxes(0, 1).reshape(said.shape[1], -1)  # [num_experts, tokens * hidden_size]
        self.products[heard.layer] += rows @ rows.T

    @property
    def distances(self) -> np.ndarray:
        """Squared distance of two experts' outputs, over all tokens: float64 [num_layers,
        num_experts, num_experts]."""
        lengths = np.diagonal(self.products, axis1=1, axis2=2)
        apart: np.ndarray = lengths[:, :, None] + lengths[:, None] - 2 * self.products
        return apart


def tokens_at_once(config: ModelConfig) -> int:
    """The prefill chunk with which a LikenessMeter needs the memory that others need."""
    return max(1, TOKENS * config.top_k // config.num_experts)


def with_everyone(routing: Routing, num_experts: int) -> Routing:
    """`routing`, and after each token's choices all other experts, with weight 0."""
    num_tokens, top_k = routing.experts.shape
    chosen = np.zeros((num_tokens, num_experts), bool)
    np.put_along_axis(chosen, routing.experts, True, axis=1)
    others = np.nonzero(~chosen)[1].reshape(num_tokens, num_experts - top_k)
    return Routing(
        np.concatenate([routing.experts, others.astype(np.int32)], axis=1),
        np.pad(routing.weights, ((0, 0), (0, num_experts - top_k))),
    )


def nearest(
    distances: np.ndarray, kept: Mapping[int, Sequence[int]]
) -> dict[int, dict[int, list[int]]]:
    """By layer and kept expert, the others that say what is nearest to what it says."""
    groups: dict[int, dict[int, list[int]]] = {}
    for layer, stay in kept.items():
        groups[layer] = {expert: [] for expert in stay}
        for expert in sorted(set(range(distances.shape[1])) - set(stay)):
            best = int(np.argmin(distances[layer, expert, list(stay)]))
            groups[layer][stay[best]].append(expert)
    return groups
