"""Samples: what each layer's experts get of a text, and what they say to it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tiered.backend import Array, Backend, Batch
from tiered.config import ModelConfig
from tiered.engine import Engine
from tiered.quality.importance import CRITERIA, Meter, Scores
from tiered.quality.layer_tap import Listener, read

BLOCK = 64  # neighbouring tokens that are trained on or held out together ...
HELD_OUT = 8  # ... every so many-th block
MIN_TOKENS = HELD_OUT * BLOCK


class Samples(NamedTuple):
    """Of one layer, token by token; all float32."""

    inputs: np.ndarray  # [num_tokens, hidden_size]: what router and experts get
    outputs: np.ndarray  # [num_tokens, hidden_size]: what they say together
    # [num_tokens]: squared length of the hidden state with the output added. All that reads it
    # norms it, so that an error counts by its share of this.
    energy: np.ndarray

    def take(self, rows: np.ndarray) -> Samples:
        return Samples(self.inputs[rows], self.outputs[rows], self.energy[rows])


def held_out(num_tokens: int) -> np.ndarray:
    """Which tokens are not trained on: bool [num_tokens]."""
    result: np.ndarray = np.arange(num_tokens) // BLOCK % HELD_OUT == HELD_OUT - 1
    return result


def sample_bytes(config: ModelConfig, num_tokens: int) -> int:
    return 4 * len(config.sparse_layers) * num_tokens * (2 * config.hidden_size + 1)


def sample_file(folder: Path, layer: int) -> Path:
    return folder / f"{layer:03}.npy"


def read_samples(folder: Path, layer: int) -> Samples:
    rows = np.load(sample_file(folder, layer))
    size = rows.shape[1] // 2
    return Samples(rows[:, :size], rows[:, size : 2 * size], rows[:, -1])


class Recorder(Listener):
    """A backend that writes down what passes through experts; everything else it hands on.

    With `shared`, what the shared expert says belongs to the output.
    """

    def __init__(
        self, backend: Backend, config: ModelConfig, folder: Path, num_tokens: int, shared: bool
    ) -> None:
        super().__init__(backend)
        shape = num_tokens, 2 * config.hidden_size + 1
        self.rows = {
            layer: np.lib.format.open_memmap(sample_file(folder, layer), "w+", np.float32, shape)
            for layer in config.sparse_layers
        }
        self._size = config.hidden_size
        self._shared = shared
        self._layer = 0
        self._next = dict.fromkeys(self.rows, 0)  # by layer: how many tokens it has seen
        self._latest: np.ndarray | None = None  # rows of the layer that is being computed

    def attention(self, x: Array, layer: Any, kv: Any, index: int, batch: Batch) -> None:
        self._layer, self._latest = index, None
        self._backend.attention(x, layer, kv, index, batch)

    def route(self, x: Array, layer: Any) -> tuple[Array, Any]:
        h, routing = self._backend.route(x, layer)
        start = self._next[self._layer]
        self._next[self._layer] = start + len(h)
        self._latest = self.rows[self._layer][start : start + len(h)]
        self._latest[:, : self._size] = h
        return h, routing

    def combine(self, x: Array, out: Array, weights: np.ndarray) -> None:
        said = np.zeros_like(x)
        self._backend.combine(said, out, weights)
        self._backend.combine(x, out, weights)
        self._note(x, said)

    def feed_forward(
        self, x: Array, h: Array | None, layer: Any, into: Array | None = None
    ) -> None:
        if self._shared and self._latest is not None:
            said = self._latest[:, self._size : -1].copy()
            self._backend.feed_forward(said, h, layer)
            self._backend.feed_forward(x, h, layer, into)
            self._note(x, said)
        else:
            self._backend.feed_forward(x, h, layer, into)

    def _note(self, x: np.ndarray, said: np.ndarray) -> None:
        assert self._latest is not None
        self._latest[:, self._size : -1] = said
        self._latest[:, -1] = np.square(x).sum(axis=1)


def record(
    open_engine: Callable[[Backend], Engine],
    backend: Backend,
    config: ModelConfig,
    ids: Sequence[int],
    folder: Path,
    shared: bool,
    progress: Callable[[int, int], None],
) -> Mapping[str, Scores]:
    """Write the samples of all layers to `folder`, and return what each expert is worth by every
    criterion of `tiered.quality.importance`."""
    recorder: Any = Recorder(backend, config, folder, len(ids), shared)
    meter: Any = Meter(recorder, config)
    with open_engine(meter) as engine:
        read(engine, ids, progress)
    for rows in recorder.rows.values():
        rows.flush()
    return {name: score(meter) for name, score in CRITERIA.items()}
