"""The decoder: embed, then attention and experts layer by layer, then the next token's logits.

Read this first. `Decoder.hidden` is what happens to a token; `Decoder.experts` is what this
project is about.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

from tiered.backend import Array, Backend, Batch
from tiered.chunks import Chunks, run_by_chunk
from tiered.clock import PartClock
from tiered.config import ModelConfig
from tiered.experts import (
    ExpertJobs,
    ExpertTable,
    Routing,
    group_by_expert,
    group_kept,
    weighted_once,
)
from tiered.routing import RoutingRules
from tiered.tracing.trace import DECODE, PREFILL

if TYPE_CHECKING:
    from tiered.cold_copy import ColdCopy


class ExpertSource(Protocol):
    """Where the decoder gets experts from: a tier, or the whole model mapped into memory."""

    def fetch(
        self, layer: int, experts: np.ndarray, starts: np.ndarray | None = None
    ) -> Iterator[tuple[Any, np.ndarray]]:
        """Yield, as they become ready, positions in `experts` and the addresses of their gate,
        up and down (int64 [count, 3]); these stay valid until the next is asked for. `starts` (as
        in ExpertJobs) says how many rows each has, for those who decide where it runs."""

    def table(self, layer: int) -> ExpertTable | None:
        """Where all experts of a layer lie, if they are in memory for good and it is enough to know
        afterwards how often each was used."""


class LookAhead(Protocol):
    """Loads what a later layer is likely to want."""

    def distances(self, layer: int) -> range:
        """How many layers ahead to guess from this one (empty: not now)."""

    def submit(self, layer: int, guess: Routing) -> None:
        """Layer `layer` is likely to want these experts."""

    def observe(self, layer: int, routing: Routing) -> None:
        """What the router of `layer` really chose."""


class RoutingRecorder(Protocol):
    """Writes down what the routers choose: a trace, or a comparison."""

    def begin(self, phase: int) -> None:
        """A forward pass begins: PREFILL or DECODE."""

    def record(self, layer: int, positions: np.ndarray, routing: Routing) -> None:
        """What a layer's router chose for the tokens at `positions`."""

    def guess(self, layer: int, distance: int, routing: Routing) -> None:
        """What `layer`'s router made of the hidden state `distance` layers before it."""


class Layer(NamedTuple):
    """One layer's prepared weights; what a layer does not have is None."""

    attention: Any
    router: Any = None
    experts: Any = None
    shared: Any = None  # the expert that every token uses
    feed_forward: Any = None  # instead of experts, in a dense layer
    merge: Any = None  # where what experts and the shared expert say is normed


NOTHING_LATE = nullcontext[Iterable[tuple[Any, np.ndarray, ExpertJobs]]](())


class Decoder:
    """Dense weights lie in the backend's memory; experts come from `source`, layer by layer."""

    def __init__(
        self,
        config: ModelConfig,
        backend: Backend,
        embedding: Any,
        layers: list[Layer],
        output: Any,
        source: ExpertSource | None,
        look_ahead: LookAhead | None = None,
        rules: RoutingRules | None = None,
        cold_copy: ColdCopy | None = None,
    ) -> None:
        self.config = config
        self.sparse_layers = config.sparse_layers
        self.backend = backend
        self.embedding = embedding
        self.layers = layers
        self.output = output
        self.source = source
        self.look_ahead = look_ahead
        self.rules = rules
        self.cold_copy = cold_copy
        self.trace: RoutingRecorder | None = None
        parts = "attention", "router", "experts", "waiting", "head"
        self.clock = PartClock(*parts, known=backend.chained_seconds)

    def forward(self, batch: Batch, kv: Any, rows: np.ndarray, output: Any = None) -> np.ndarray:
        """Logits after the tokens at `rows` of the batch: float32 [len(rows), vocab_size]; or what
        another `output` layer than the model's own makes of their hidden states."""
        return self.head(self.hidden(batch, kv), rows, output)

    def hidden(self, batch: Batch, kv: Any, chunk: int = 0) -> Array:
        """The batch after all layers, for `head`: valid until the next pass. A prompt of more than
        `chunk` tokens (0: any number) has the bits that it would have in several passes."""
        self.clock.start()
        if self.trace is not None:
            self.trace.begin(PREFILL if len(batch.tokens) > 1 else DECODE)
        if self.rules is not None:
            self.rules.begin(len(batch.tokens))
        b, chunks = self.backend.of_layer(0), Chunks(batch, chunk)
        x = self.again(batch, kv) if chunks.is_one else None
        if x is not None:
            return x
        with self.backend.chain(len(batch.tokens), self.layers):
            # [num_tokens, hidden_size]
            x = b.embed(self.embedding, batch.tokens, self.config.embedding_scale)
            for index in range(len(self.layers)):
                x = self.backend.of_layer(index).take(x)  # to the next GPU, where there are several
                self.layer(x, index, chunks, kv)
        self.clock.lap("experts")
        return x

    def again(self, batch: Batch, kv: Any) -> Array | None:
        """What `hidden` does, if it is the same calls as for the tokens before."""
        sparse = self.sparse_layers
        if sparse and self.table(sparse[0]) is None:
            return None
        scale = self.config.embedding_scale
        x = self.backend.again(self.layers, self.embedding, batch, kv, scale)
        if x is not None:
            self.clock.lap("experts")
        return x

    def layer(self, x: Array, index: int, chunks: Chunks, kv: Any) -> None:
        """Attention, then experts or what a dense layer has instead."""
        b, clock, layer = self.backend.of_layer(index), self.clock, self.layers[index]
        for rows, batch in zip(chunks.of(x), chunks.batches, strict=True):
            b.attention(rows, layer.attention, kv, index, batch)
        clock.lap("attention")
        if layer.experts is None:
            for rows in chunks.of(x):
                b.feed_forward(rows, None, layer.feed_forward)
            clock.lap("experts")
        else:
            self.experts(x, index, chunks)

    def head(self, x: Array, rows: np.ndarray, output: Any = None) -> np.ndarray:
        """Logits after the tokens at `rows` of `x`, as `forward` tells."""
        self.clock.start()
        last = self.backend.of_layer(-1)
        logits = last.head(last.take(x), rows, output or self.output)
        self.clock.lap("head")
        return logits

    def experts(self, x: Array, index: int, chunks: Chunks) -> None:
        """Route, look ahead, fetch, run, combine: x += experts(norm(x))."""
        b, layer, into, dense = self.backend.of_layer(index), self.layers[index], x, None
        if layer.merge is not None:
            dense, into = b.branches(x)
        table = self.table(index) if chunks.is_one else None
        if table is not None:
            h = b.routed_experts(x, layer.router, layer.experts, table, into)
        else:
            h = self.fetched_experts(x, index, chunks, into)
        if layer.merge is not None:
            for rows, target in zip(chunks.of(x), chunks.of(dense), strict=True):
                b.feed_forward(rows, None, layer.shared, target)
            b.merge(x, dense, into, layer.merge)
        elif layer.shared is not None:
            for rows, normed in zip(chunks.of(x), chunks.of(h), strict=True):
                b.feed_forward(rows, normed, layer.shared)
        self.clock.lap("experts")

    def table(self, index: int) -> ExpertTable | None:
        """Where the layer's experts lie, if only the backend has to know which are chosen."""
        if (
            self.rules is not None
            or self.look_ahead is not None
            or self.cold_copy is not None
            or self.trace is not None
            or self.config.weighted_inputs
            or not self.backend.finds_experts
        ):
            return None
        return self.source.table(index) if self.source is not None else None

    def fetched_experts(self, x: Array, index: int, chunks: Chunks, into: Array) -> Array:
        """into += experts(norm(x)), which are fetched as the router chooses; norm(x)."""
        b, clock, layer = self.backend.of_layer(index), self.clock, self.layers[index]
        h, routing = self.route(x, index, chunks)  # [num_tokens, hidden_size]
        clock.lap("router")
        if self.rules is not None:
            routing = self.rules.apply(index, routing)
        if self.look_ahead is not None:
            self.look_ahead.observe(index, routing)
        given, weights = weighted_once(b, h, routing.weights, self.config)
        out = b.pair_outputs(routing.experts.size)  # [num_tokens * top_k, hidden_size]
        if self.rules is None:
            jobs = group_by_expert(routing)
        else:
            jobs, dropped = group_kept(routing)
            out[dropped] = 0.0  # nobody computes these, and 0 times garbage may be no number
        late: AbstractContextManager[Iterable[tuple[Any, np.ndarray, ExpertJobs]]] = NOTHING_LATE
        if self.cold_copy is not None:
            jobs, cold = self.cold_copy.split(index, routing, jobs)
            if cold is not None:
                late = self.cold_copy.fetch(index, cold)
        run = partial(run_by_chunk, b, num_tokens=len(x), size=chunks.size)
        guessed = self.look_ahead is None
        assert self.source is not None
        with late as copies:
            for ready, addresses in self.source.fetch(index, jobs.experts, jobs.starts):
                clock.lap("waiting")
                if not guessed:  # only now: the loads that this layer waits for are queued already
                    self.guess(x, h, index)
                    guessed = True
                    clock.lap("router")
                run(given, layer.experts, addresses, jobs.take(ready), out)
                clock.lap("experts")
            for cold_layer, addresses, cold in copies:
                clock.lap("waiting")
                run(given, cold_layer, addresses, cold, out)
                clock.lap("experts")
        b.combine(into, out, weights)
        if self.trace is not None:
            self.trace.record(index, chunks.positions, routing)
        return h

    def route(self, x: Array, index: int, chunks: Chunks) -> tuple[Array, Routing]:
        """norm(x) and what the router makes of it."""
        b, router = self.backend.of_layer(index), self.layers[index].router
        if chunks.is_one:
            return b.route(x, router)
        h, routings = b.hidden_states(len(x)), []
        for rows, own in zip(chunks.rows, chunks.of(x), strict=True):
            h[rows], routing = b.route(own, router)
            routings.append([part.copy() for part in routing])  # they stay until the next call
        return h, Routing(*map(np.concatenate, zip(*routings, strict=True)))

    def guess(self, x: Array, h: Array, index: int) -> None:
        """Apply the routers of layers ahead to this layer's hidden state."""
        if self.look_ahead is None:
            return
        for distance in self.look_ahead.distances(index):
            ahead = self.layers[index + distance]
            if ahead.router is not None:
                b = self.backend.of_layer(index + distance)
                guess = b.guess(b.take(x), b.take(h), ahead.router)
                if self.rules is not None:
                    guess = self.rules.apply(index + distance, guess, is_guess=True)
                self.look_ahead.submit(index + distance, guess)
                if self.trace is not None:
                    self.trace.guess(index + distance, distance, guess)
