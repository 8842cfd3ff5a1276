"""A tap: a backend that hears what the experts of every layer say, and hands everything on."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import numpy as np

from tiered.backend import Array, Backend, Batch
from tiered.engine import Engine
from tiered.experts import Routing
from tiered.quality.windows import cut

WINDOW = 512  # tokens of the text that are read together
Progress = Callable[[int, int], None]  # windows done, of how many


class Heard(NamedTuple):
    """What a layer's experts said about some tokens, before it is combined."""

    layer: int
    residual: np.ndarray  # float64 [num_tokens]: squared length of what the layer's router got
    experts: np.ndarray  # int32 [num_tokens, top_k]
    weights: np.ndarray  # float32 [num_tokens, top_k]
    out: np.ndarray  # float32 [num_tokens, top_k, hidden_size]


class Listener:
    """A CPU's backend that others build on: what they do not hear themselves, it hands on."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    finds_experts = False  # it wants to hear what is chosen

    def of_layer(self, index: int) -> Any:
        """This one hears every layer."""
        return self

    def chain(self, num_tokens: int, layers: Any) -> AbstractContextManager[None]:
        """It looks into arrays between two calls, so nothing is put off."""
        return nullcontext()

    def again(self, *_: Any) -> None:
        """No pass is done without being heard."""


class LayerTap(Listener):
    """A CPU's backend, and `hear`, which is called once per layer and forward pass."""

    def __init__(self, backend: Backend) -> None:
        super().__init__(backend)
        self._layer = 0
        self._residual = np.zeros(0)
        self._experts = np.zeros((0, 0), np.int32)  # of the latest routing

    @abstractmethod
    def hear(self, heard: Heard) -> None: ...

    def attention(self, x: Array, layer: Any, kv: Any, index: int, batch: Batch) -> None:
        self._layer = index
        self._backend.attention(x, layer, kv, index, batch)

    def route(self, x: Array, layer: Any) -> tuple[Array, Routing]:
        h, routing = self._backend.route(x, layer)
        self._residual = np.square(x, dtype=np.float64).sum(axis=1)
        self._experts = routing.experts
        return h, routing

    def combine(self, x: Array, out: Array, weights: np.ndarray) -> None:
        said = np.asarray(out).reshape(*weights.shape, -1)
        self.hear(Heard(self._layer, self._residual, self._experts, weights, said))
        self._backend.combine(x, out, weights)


def read(engine: Engine, ids: Sequence[int], progress: Progress) -> None:
    """Let a text pass through an engine, window by window, whose backend is a tap."""
    size = min(WINDOW, engine.context)
    windows = cut(len(ids), size, size)
    for done, window in enumerate(windows):
        progress(done, len(windows))
        part = ids[window.begin : window.end]
        for _ in engine.logits_by_rows(part, start=len(part) - 1):
            pass
    progress(len(windows), len(windows))
