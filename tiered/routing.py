"""Routing rules: what becomes of the router's choice before anything is fetched or computed.

A rule takes experts away from a token, because they have little weight or would have to be read
from disk for it, or puts a recorded choice in the place of the router's.
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
from tiered.layer_k import read_layer_k
from tiered.tracing.trace import Pass, Routed, read_trace


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
        recorded: RecordedRouting | None = None,
        cold: Cold | None = None,
        layer_k: Mapping[int, int] | None = None,
    ) -> None:
        self.cut = cut
        self.cuts = {  # of the layers that differ
            layer: cut._replace(top_k=min(top_k, cut.top_k or top_k))
            for layer, top_k in (layer_k or {}).items()
        }
        self.normalize = normalize
        self.recorded = recorded
        self.cold = cold
        self.chosen = self.dropped = 0  # experts, token by token
        self.chosen_weight = self.dropped_weight = 0.0

    def begin(self, num_tokens: int) -> None:
        """A forward pass of so many tokens begins."""
        if self.recorded is not None:
            self.recorded.begin(num_tokens)

    def apply(self, layer: int, routing: Routing, is_guess: bool = False) -> Routing:
        """What the layer uses instead of `routing`; of a guess, what it would use if all experts
        were in memory."""
        if self.recorded is not None:
            routing = self.recorded.layer(layer)
        kept = kept_experts(routing.weights, self.cuts.get(layer, self.cut))
        if not is_guess:
            self._count(routing.weights, kept)
        routing = keep(routing, kept, self.normalize)
        if self.cold is None or is_guess or len(routing.experts) > Cold.MOST_TOKENS:
            return routing
        return keep(routing, self.cold.kept(layer, routing), self.normalize)

    def _count(self, weights: np.ndarray, kept: np.ndarray) -> None:
        chosen = weights > 0
        dropped = chosen & ~kept
        self.chosen += int(chosen.sum())
        self.chosen_weight += float(weights.sum())
        self.dropped += int(dropped.sum())
        self.dropped_weight += float(weights[dropped].sum())


class RecordedRouting:
    """The routing of a trace, forward pass by forward pass."""

    def __init__(self, path: Path, passes: list[dict[int, Routing]]) -> None:
        self.path = path
        self.passes = passes
        self._next = 0

    def begin(self, num_tokens: int) -> None:
        """Go to the next pass. ValueError if it was recorded from something else."""
        recorded = self.passes[self._next] if self._next < len(self.passes) else {}
        found = len(next(iter(recorded.values())).experts) if recorded else 0
        if found != num_tokens:
            raise ValueError(
                f"{self.path}: forward pass {self._next + 1} of it has {found} tokens, but here "
                f"come {num_tokens}: a recorded routing suits only the text, window and stride "
                "(or prompt) that it was recorded with"
            )
        self._next += 1

    def layer(self, layer: int) -> Routing:
        return self.passes[self._next - 1][layer]


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
    recorded = choices.routing and read_routing(Path(choices.routing), config)
    cold = Cold(choices.drop_cold, is_resident) if choices.drop_cold else None
    layer_k = choices.expert_layer_k and read_layer_k(Path(choices.expert_layer_k), config)
    return RoutingRules(cut, config.normalize_top_k, recorded or None, cold, layer_k or None)


def read_routing(path: Path, config: ModelConfig) -> RecordedRouting:
    """The passes of a trace. ValueError if it is damaged or was recorded from another model."""
    passes: list[dict[int, Routing]] = []
    for event in read_trace(path).events:
        if isinstance(event, Pass):
            passes.append({})
        elif isinstance(event, Routed) and passes:
            passes[-1][event.layer] = event.routing
    layers = config.sparse_layers
    if passes and len(passes[-1]) < len(layers):
        passes.pop()  # it ended in the middle of it
    for recorded in passes:
        if sorted(recorded) != layers or not all(
            _is_sound(routing, config.num_experts) for routing in recorded.values()
        ):
            raise ValueError(f"{path} was recorded from another model, or is damaged")
    if not passes:
        raise ValueError(f"{path} has no whole forward pass: record one with tiered ppl --record")
    return RecordedRouting(path, passes)


def _is_sound(routing: Routing, num_experts: int) -> bool:
    """Whether every token has weights that are numbers, and no expert twice."""
    experts, weights = routing
    if experts.size == 0 or not (np.isfinite(weights) & (weights >= 0)).all():
        return False
    used = np.where(weights > 0, experts, -1 - np.arange(experts.shape[1]))  # unused: all distinct
    used.sort(axis=1)
    distinct = (np.diff(used, axis=1) > 0).all()
    return bool(distinct and experts.max() < num_experts and (weights.sum(axis=1) > 0).all())


def cut_routing(routing: Routing, cut: Cut, normalize: bool) -> Routing:
    """`routing` without what `cut` takes away; columns that nobody keeps are left out."""
    return keep(routing, kept_experts(routing.weights, cut), normalize)


def keep(routing: Routing, kept: np.ndarray, normalize: bool) -> Routing:
    """`routing` without choices that are not `kept` (bool [num_tokens, top_k])."""
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
