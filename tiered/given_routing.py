"""Given routing: experts and weights in the place of the routers' own, from a file.

A trace has them token by token. A table has them by layer, for all tokens of any text:

    {"routing": {"0": {"experts": [3, 5], "weights": [0.7, 0.3]}, "1": {"experts": [0]}}}

Layers that a table does not name route as ever; without weights, experts have equal shares.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import numpy as np

from tiered.checkpoints.json_file import read_json
from tiered.config import ModelConfig
from tiered.experts import Routing
from tiered.tracing.trace import MAGIC, Pass, Routed, read_trace


class GivenRouting(Protocol):
    is_of_one_text: bool  # suits nothing else than what it was recorded from

    def begin(self, num_tokens: int) -> None:
        """A forward pass of so many tokens begins."""

    def layer(self, layer: int) -> Routing | None:
        """For these tokens; None: the router's choice stands."""


class RecordedRouting:
    """The routing of a trace, forward pass by forward pass."""

    is_of_one_text = True

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


class FixedRouting:
    """The same experts and weights for every token: by layer, int32 and float32 [top_k]."""

    is_of_one_text = False

    def __init__(self, layers: dict[int, Routing]) -> None:
        self._layers = layers
        self._num_tokens = 0

    def begin(self, num_tokens: int) -> None:
        self._num_tokens = num_tokens

    def layer(self, layer: int) -> Routing | None:
        found = self._layers.get(layer)
        if found is None:
            return None
        return Routing(*(np.tile(row, (self._num_tokens, 1)) for row in found))


def read_routing(path: Path, config: ModelConfig) -> GivenRouting:
    """A trace, or a table. ValueError if it is damaged or belongs to another model."""
    with path.open("rb") as file:
        is_trace = file.read(len(MAGIC)) == MAGIC
    return _read_recorded(path, config) if is_trace else _read_fixed(path, config)


def _read_recorded(path: Path, config: ModelConfig) -> RecordedRouting:
    """The passes of a trace."""
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


def _read_fixed(path: Path, config: ModelConfig) -> FixedRouting:
    """The layers of a table."""
    table = read_json(path).get("routing")
    if not isinstance(table, dict) or not table:
        raise ValueError(
            f"{path} is neither a trace nor a table of routes: "
            '{"routing": {LAYER: {"experts": [...], "weights": [...]}}}'
        )
    known = {str(layer): layer for layer in config.sparse_layers}
    for name in table:
        if name not in known:
            raise ValueError(f"{path}: the model has no experts in a layer {name!r}")
    return FixedRouting({known[n]: _route(path, n, route, config) for n, route in table.items()})


def _route(path: Path, layer: str, route: Any, config: ModelConfig) -> Routing:
    experts = route.get("experts") if isinstance(route, dict) else None
    if (
        not isinstance(experts, list)
        or not 1 <= len(experts) <= config.top_k
        or not all(type(e) is int and 0 <= e < config.num_experts for e in experts)
        or len(set(experts)) < len(experts)
    ):
        raise ValueError(
            f"{path}: layer {layer} must have 1 to {config.top_k} different experts, numbered 0 to "
            f"{config.num_experts - 1}"
        )
    weights = route.get("weights", [config.routing_scale / len(experts)] * len(experts))
    if (
        not isinstance(weights, list)
        or len(weights) != len(experts)
        or not all(type(w) in (int, float) and 0 < w < np.inf for w in weights)
    ):
        raise ValueError(f"{path}: layer {layer} must have a weight above 0 for each expert")
    return Routing(np.array(experts, np.int32), np.array(weights, np.float32))
