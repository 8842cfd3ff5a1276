"""A walk: a text goes through a model one layer at a time, all of its windows before the next
layer, so that only one layer's weights are needed at once, and each can be changed before its turn.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from tiered.backend import Batch, open_cpu
from tiered.checkpoints.checkpoint import Checkpoint
from tiered.chunks import Chunks
from tiered.config import EngineConfig
from tiered.experts import LayerLayouts, weighted_once
from tiered.kv_cache import KVCache
from tiered.model import Decoder, Layer
from tiered.weights.loader import WeightLoader

States = list[np.ndarray]  # float32 [num_tokens, hidden_size] of each window


class Given(NamedTuple):
    """What a layer's experts were given: rows of `inputs` and weights of the results, by pair of a
    token and an expert."""

    inputs: np.ndarray  # float32 [num_tokens, hidden_size], or [num_pairs, hidden_size]
    rows: np.ndarray  # int64 [num_pairs]: of `inputs`
    experts: np.ndarray  # int32 [num_pairs]
    weights: np.ndarray  # float32 [num_pairs]


class LayerExperts:
    """One layer's experts at the given addresses (int64 [num_experts, 3]), as a decoder wants
    them."""

    def __init__(self, addresses: np.ndarray) -> None:
        self.addresses = addresses

    def fetch(
        self, layer: int, experts: np.ndarray, starts: np.ndarray | None = None
    ) -> Iterator[tuple[Any, np.ndarray]]:
        yield range(len(experts)), self.addresses[experts]

    def table(self, layer: int) -> None:
        """It is for one layer, of many tokens."""


class Layouts:
    """The layouts of one layer's experts, in the place of a store's."""

    def __init__(self, layouts: LayerLayouts) -> None:
        self._layouts = layouts

    def layouts(self, layer: int) -> LayerLayouts:
        return self._layouts


class Walk:
    """`windows` are a text's tokens, each computed from its first on. Close it to end its threads.

    The order of calls: `open` a layer, `attend`, then, if it has experts, `given` and `run`.
    """

    def __init__(
        self, checkpoint: Checkpoint, windows: Sequence[Sequence[int]], choices: EngineConfig
    ) -> None:
        self.checkpoint, self.config = checkpoint, checkpoint.config
        self.backend = open_cpu(choices)
        self.loader = WeightLoader(checkpoint, self.backend, choices.quantize)
        self.decoder = Decoder(
            self.config, self.backend, self.loader.embedding(),
            [Layer(None)] * self.config.num_layers, self.loader.output(), None,
        )  # fmt: skip
        longest = max(map(len, windows))
        self._kv = KVCache(self.backend, self.config, longest, choices.kv_dtype)
        self._batches = [self._batch(window) for window in windows]

    def _batch(self, window: Sequence[int]) -> Batch:
        """Windows follow each other through a layer, so that all may use the same pages."""
        sequence = self._kv.open()
        batch = self._kv.batch([(sequence, window)])
        batch = batch._replace(page_tables=batch.page_tables.copy())
        self._kv.close(sequence)
        return batch

    def start(self) -> States:
        """The text before the first layer."""
        scale = self.config.embedding_scale
        embed, table = self.backend.embed, self.decoder.embedding
        return [np.array(embed(table, batch.tokens, scale)) for batch in self._batches]

    def open(self, index: int, layouts: LayerLayouts | None) -> None:
        """Load a layer's dense weights; `layouts` are those of its experts, if it has any."""
        store: Any = None if layouts is None else Layouts(layouts)
        self.decoder.layers[index] = self.loader.layer(index, store)

    def use(self, index: int, layouts: LayerLayouts) -> None:
        """Let the layer's experts have other layouts; its dense weights stay."""
        store: Any = Layouts(layouts)
        experts = self.loader.experts(index, store)
        self.decoder.layers[index] = self.decoder.layers[index]._replace(experts=experts)

    def leave(self, index: int) -> None:
        """Let go of a layer's weights."""
        self.decoder.layers[index] = Layer(None)

    def attend(self, index: int, states: States) -> None:
        """Attention, and the feed-forward of a layer without experts."""
        layer = self.decoder.layers[index]
        for x, batch in zip(states, self._batches, strict=True):
            if batch.states is not None:  # recurrent layers begin anew with each window
                batch = batch._replace(states=[self.backend.recurrent_state(self.config)])
            self.backend.attention(x, layer.attention, self._kv.pages, index, batch)
            if layer.experts is None:
                self.backend.feed_forward(x, None, layer.feed_forward)

    def given(self, index: int, states: States) -> Given:
        """What the layer's router makes of the states, which stay as they are."""
        router = self.decoder.layers[index].router
        inputs, experts, weights = [], [], []
        for x in states:
            h, routing = self.backend.route(x, router)
            given, scales = weighted_once(self.backend, h, routing.weights, self.config)
            inputs.append(np.array(given))
            experts.append(routing.experts.reshape(-1).copy())
            weights.append(scales.reshape(-1).copy())
        per_row = 1 if self.config.weighted_inputs else self.config.top_k
        rows = np.arange(sum(map(len, experts))) // per_row
        return Given(np.concatenate(inputs), rows, np.concatenate(experts), np.concatenate(weights))

    def run(self, index: int, states: States, addresses: np.ndarray) -> None:
        """The layer's experts, which lie at these addresses."""
        self.decoder.source = LayerExperts(addresses)
        for x, batch in zip(states, self._batches, strict=True):
            self.decoder.experts(x, index, Chunks(batch))

    def logits(self, x: np.ndarray, rows: slice) -> np.ndarray:
        """After the last layer, of these rows of a window: float32 [num_rows, vocab_size]."""
        return self.decoder.head(x, np.arange(len(x))[rows])

    def close(self) -> None:
        self.backend.close()
