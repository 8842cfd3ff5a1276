"""Rows: what a model says after neighbouring tokens of a text, and where its routers sent them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from tiered.engine import Engine
from tiered.experts import Routing
from tiered.quality.likelihood import token_log_probs
from tiered.quality.windows import Window


class Rows(NamedTuple):
    """`logits` may be shifted by a constant per row: only their softmax counts."""

    logits: np.ndarray  # float32 [num_rows, vocab_size]
    losses: np.ndarray  # float64 [num_rows]: of the tokens that follow, in nats
    best: np.ndarray  # int32 [num_rows]: the likeliest token
    experts: np.ndarray  # int16 [num_sparse_layers, num_rows, top_k]; -1: none


class RoutingLog:
    """What the routers chose in the latest forward pass: takes a trace's place in the decoder."""

    def __init__(self) -> None:
        self.layers: dict[int, Routing] = {}

    def begin(self, phase: int) -> None:
        self.layers = {}

    def record(self, layer: int, positions: np.ndarray, routing: Routing) -> None:
        self.layers[layer] = routing

    def guess(self, layer: int, distance: int, routing: Routing) -> None:
        """Guesses change nothing that the model says."""

    def rows(self, start: int, num_rows: int) -> np.ndarray:
        """Experts of tokens of the pass: int16 [num_sparse_layers, num_rows, top_k]."""
        layers = [routing for _, routing in sorted(self.layers.items())]
        top_k = max((routing.experts.shape[1] for routing in layers), default=0)
        result = np.full((len(layers), num_rows, top_k), -1, np.int16)
        for chosen, (experts, weights) in zip(result, layers, strict=True):
            used = np.where(weights > 0, experts, -1)[start : start + num_rows]
            chosen[:, : used.shape[1]] = used
        return result


def text_rows(engine: Engine, ids: Sequence[int], windows: Sequence[Window]) -> Iterator[Rows]:
    """Rows for every predicted token, in order, a few at a time."""
    log, before = RoutingLog(), engine.decoder.trace
    engine.decoder.trace = log
    try:
        for begin, end, at in windows:
            for logits in engine.logits_by_rows(ids[begin : end - 1], start=at - 1 - begin):
                losses = -token_log_probs(logits, ids[at : at + len(logits)])
                best = logits.argmax(axis=1).astype(np.int32)
                experts = log.rows((at - 1 - begin) % engine.choices.prefill_chunk, len(logits))
                yield Rows(logits, losses, best, experts)
                at += len(logits)
    finally:
        engine.decoder.trace = before
