"""Routing rules: what becomes of the router's choice before anything is fetched or computed.

A rule takes experts away from a token, because they have little weight or would have to be read
from disk for it, or puts a given choice in the place of the router's.
What is taken away is neither fetched nor computed: its weight is 0, and it names an expert that the
token keeps, so that nobody who counts experts sees it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tiered.config import EngineConfig, ModelConfig
from tiered.experts import ExpertKey, Routing
from tiered.given_routing import GivenRouting, read_routing
from tiered.layer_k import read_layer_k
from tiered.stats import EngineStats


class Cut(NamedTuple):
    """Which experts a token keeps, rule by rule in this order; at least one."""

    top_k: int | None = None  # the first so many; of layers with a number of their own, these
    top_p: float = 1.0  # of these the fewest that have this share of their weight
    min_weight: float = 0.0  # of these the ones with at least this times the largest weight


class Cold:
    """Experts of little weight that are not in memory: the tokens that are being written do
    without. (A prompt's tokens share what is read for one of them.)"""

    MOST_TOKENS = 8  # of a step that writes

    def __init__(self, ratio: float, is_resident: Callable[[ExpertKey], bool]) -> None:
        self.ratio = ratio  # of a token's largest weight: those below it may be left out
        self.is_resident = is_resident
        self.skipped = 0  # experts, token by token
        self.skipped_weight = 0.0  # and what they had of ...
        self.weight = 0.0  # ... all weights

    def kept(self, layer: int, routing: Routing) -> np.ndarray:
        """Whether a choice stays: bool [num_tokens, top_k]."""
        experts, weights = routing
        light = weights < self.ratio * weights.max(axis=1, keepdims=True)
        light &= weights > 0
        for token, rank in np.argwhere(light).tolist():
            light[token, rank] = not self.is_resident(ExpertKey(layer, int(experts[token, rank])))
        self.skipped += int(light.sum())
        self.skipped_weight += float(weights[light].sum())
        self.weight += float(weights.sum())
        kept: np.ndarray = ~light & (weights > 0)
        return kept


class RoutingRules:
    """What is to be done with each choice of a model's routers.

    `layer_k`: experts that tokens keep at most, by layer. `normalize`: the weights of what a token
    keeps add up to what all of them did, as in a model whose router chooses fewer.
    """

    def __init__(
        self,
        cut: Cut,
        normalize: bool,
        given: GivenRouting | None = None,
        cold: Cold | None = None,
        layer_k: Mapping[int, int] | None = None,
    ) -> None:
        self.cut = cut
        self.cuts = {  # of the layers that differ
            layer: cut._replace(top_k=min(top_k, cut.top_k or top_k))
            for layer, top_k in (layer_k or {}).items()
        }
        self.normalize = normalize
        self.given = given
        self.cold = cold
        self.chosen = self.dropped = 0  # experts, token by token
        self.chosen_weight = self.dropped_weight = 0.0

    def begin(self, num_tokens: int) -> None:
        """A forward pass of so many tokens begins."""
        if self.given is not None:
            self.given.begin(num_tokens)

    def apply(self, layer: int, routing: Routing, is_guess: bool = False) -> Routing:
        """What the layer uses instead of `routing`; of a guess, what it would use if all experts
        were in memory."""
        if self.given is not None:
            routing = self.given.layer(layer) or routing
        kept = kept_experts(routing.weights, self.cuts.get(layer, self.cut))
        if not is_guess:
            self._count(routing.weights, kept)
        routing = keep(routing, kept, self.normalize)
        if self.cold is None or is_guess or len(routing.experts) > Cold.MOST_TOKENS:
            return routing
        return keep(routing, self.cold.kept(layer, routing), self.normalize)

    def report(self, stats: EngineStats) -> None:
        """Write what was counted so far to `stats`."""
        stats.chosen_experts, stats.chosen_weight = self.chosen, self.chosen_weight
        stats.dropped_experts, stats.dropped_weight = self.dropped, self.dropped_weight
        if (cold := self.cold) is not None:
            stats.skipped_experts, stats.skipped_weight = cold.skipped, cold.skipped_weight
            stats.routed_weight = cold.weight

    def _count(self, weights: np.ndarray, kept: np.ndarray) -> None:
        chosen = weights > 0
        dropped = chosen & ~kept
        self.chosen += int(chosen.sum())
        self.chosen_weight += float(weights.sum())
        self.dropped += int(dropped.sum())
        self.dropped_weight += float(weights[dropped].sum())


def open_rules(
    choices: EngineConfig, config: ModelConfig, is_resident: Callable[[ExpertKey], bool]
) -> RoutingRules | None:
    """The rules that the user chose; None: the routers' choices stand. ValueError if they do not
    suit the model. `is_resident` says whether an expert is in memory."""
    cut = Cut(choices.expert_top_k, choices.expert_top_p, choices.expert_min_weight)
    wanted = choices.routing, choices.expert_layer_k
    if cut == Cut() and wanted == (None, None) and not choices.drop_cold:
        return None
    if not config.sparse_layers:
        raise ValueError("routing cannot be changed: this model is dense, it routes nothing")
    if cut.top_k is not None and cut.top_k > config.top_k:
        raise ValueError(
            f"expert_top_k is {cut.top_k}, but this model's routers choose {config.top_k}"
        )
    given = choices.routing and read_routing(Path(choices.routing), config)
    cold = Cold(choices.drop_cold, is_resident) if choices.drop_cold else None
    layer_k = choices.expert_layer_k and read_layer_k(Path(choices.expert_layer_k), config)
    return RoutingRules(cut, config.normalize_top_k, given or None, cold, layer_k or None)


def keep(routing: Routing, kept: np.ndarray, normalize: bool) -> Routing:
    """`routing` without choices that are not `kept` (bool [num_tokens, top_k]); columns that nobody
    keeps are left out."""
    if kept.all():
        return routing
    columns = kept.any(axis=0)
    experts, weights, kept = (array[:, columns] for array in (*routing, kept))
    one = np.take_along_axis(experts, kept.argmax(axis=1)[:, None], axis=1)
    weights = np.where(kept, weights, np.float32(0))
    if normalize:
        total = routing.weights.sum(axis=1, keepdims=True)
        weights *= total / weights.sum(axis=1, keepdims=True)
    return Routing(np.where(kept, experts, one), weights)


def kept_experts(weights: np.ndarray, cut: Cut) -> np.ndarray:
    """Whether a choice stays: bool, the shape of `weights` [num_tokens, top_k]."""
    kept = weights > 0
    if cut.top_k is not None:
        kept[:, cut.top_k :] = False
    if cut.top_p < 1:
        left = np.where(kept, weights, 0.0)
        order = np.argsort(-left, axis=1, kind="stable")
        ranked = np.take_along_axis(left, order, axis=1).astype(np.float64)
        before = np.cumsum(ranked, axis=1) - ranked
        wanted = before < cut.top_p * ranked.sum(axis=1, keepdims=True)
        kept &= np.take_along_axis(wanted, np.argsort(order, axis=1), axis=1)
    if cut.min_weight > 0:
        largest = np.where(kept, weights, 0.0).max(axis=1, keepdims=True)
        kept &= weights >= cut.min_weight * largest
    return kept
