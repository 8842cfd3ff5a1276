"""Chosen experts: a source of which is known what is in memory, so that a decoder can be timed
layer by layer with as many hits and misses as are wanted."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from itertools import pairwise
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np

from tiered import policies
from tiered.clock import PartClock
from tiered.engine import Engine
from tiered.experts import ExpertKey
from tiered.slots import RamMemory
from tiered.source import TieredExperts
from tiered.tier import Tier


class Kind(NamedTuple):
    """What a layer's experts are."""

    hits: int
    misses: int


class Usage(NamedTuple):
    """How a text uses a layer's experts, on average."""

    misses: float  # of a token
    reuse: float  # share of a token's experts that the token before had, too


class LayerTimes(NamedTuple):
    """Seconds of one layer's experts. Those of `first` are computed while others are read."""

    lookup: float  # until the first group was there: what is in memory, if anything is
    first: float  # to compute that group
    arrival: float  # until the last group was there
    last: float  # to compute that group
    rest: float  # to combine what experts said, and what a shared expert takes


class Choice(NamedTuple):
    kind: Kind
    experts: np.ndarray  # int32 [hits + misses]
    misses: list[ExpertKey]


class LapClock(PartClock):
    """Remembers every lap, in order, and the kinds of layers between them; takes little time."""

    def __init__(self, known: Callable[[], Mapping[str, float]]) -> None:
        super().__init__("waiting", known=known)
        self._laps: list[tuple[str, float, Mapping[str, float]]] = []
        self._layers: list[tuple[Kind, int]] = []  # and how many laps came before

    def lap(self, part: str) -> None:
        now = perf_counter()
        self._laps.append((part, now - self._last, self._known()))
        self._last = now

    def layer(self, kind: Kind) -> None:
        """From here on, laps are those of another layer's experts."""
        self._layers.append((kind, len(self._laps)))

    def take(self) -> tuple[list[tuple[str, float]], list[tuple[Kind, LayerTimes]]]:
        """All laps since the last call, with their seconds; and the times of layers."""
        places = [place for _, place in self._layers] + [len(self._laps)]
        layers = [
            (kind, _layer_times(_told(self._laps[start:end])))
            for (kind, _), (start, end) in zip(self._layers, pairwise(places), strict=True)
        ]
        laps = _told(self._laps)
        self._laps.clear()
        self._layers.clear()
        return laps, layers


def _told(laps: list[tuple[str, float, Mapping[str, float]]]) -> list[tuple[str, float]]:
    """What was another part's, in laps of its own."""
    told = []
    for part, seconds, known in laps:
        told += [(name, spent) for name, spent in known.items() if spent]
        told.append((part, seconds - sum(known.values())))
    return told


def _layer_times(laps: list[tuple[str, float]]) -> LayerTimes:
    laps = [lap for lap in laps if lap[0] in ("waiting", "experts")]
    first = next(place for place, (part, _) in enumerate(laps) if part == "waiting")
    last = max(place for place, (part, _) in enumerate(laps) if part == "waiting")
    seconds = [seconds for _, seconds in laps]
    return LayerTimes(
        seconds[first],
        seconds[first + 1],
        sum(seconds[first : last + 1]),
        seconds[last + 1],
        sum(seconds[last + 2 :]),
    )


class ChosenExperts:
    """A decoder's source, which gives it other experts than it asks for.

    Some of each layer stay in a tier. What the decoder gets is so many of them and so many others;
    these are forgotten as soon as they were used. Reads slow down what computes beside them, and
    caches help with experts that come again: `usage` should be that of what is forecast. `clock` is
    the decoder's.
    """

    def __init__(self, engine: Engine, usage: Usage, clock: LapClock, stack: ExitStack) -> None:
        store, config = engine.store, engine.config
        assert store is not None
        below, k = engine.blocks or store, config.top_k
        several = min(max(2, round(2 * usage.misses)), k, config.num_experts - k)
        if several < 1:
            raise ValueError(
                f"{engine.checkpoint.path} uses all experts for each token: there is nothing to "
                "forecast for a smaller budget"
            )
        self.all_there, self.fewest = Kind(k, 0), Kind(1, 0)
        self.one_missing, self.several_missing = Kind(k - 1, 1), Kind(k - several, several)
        self._untried = [self.all_there, self.fewest, self.one_missing, self.several_missing]
        rate = max(usage.misses, 0.5 / len(config.sparse_layers)) / (0.5 + 0.5 * several)
        self._miss_rate = min(1.0, rate)  # of layers
        num_residents = min(k + max(1, k // 2), config.num_experts - several)
        self._clock, self._usage, self._top_k = clock, usage, k
        self._next: list[dict[int, Choice]] = []  # of tokens, the next one last
        self._last = config.sparse_layers[-1]
        self._random = np.random.default_rng(0)
        self._split = {
            layer: np.split(self._random.permutation(config.num_experts), [num_residents])
            for layer in config.sparse_layers
        }
        blobs = [num_residents * below.blob_bytes[layer] for layer in config.sparse_layers]
        space = below.space(sum(blobs) + k * max(below.blob_bytes))
        policy = policies.create(engine.choices.policy, space)
        self.tier = Tier(RamMemory(space), below, policy, engine.choices.readers)
        stack.callback(self.tier.close)
        self._source = TieredExperts(self.tier, below.offsets)

    def prepare(self, num_tokens: int) -> None:
        """Choose for the next tokens, before their time begins."""
        self._next = [self._choices() for _ in range(num_tokens)][::-1]

    @property
    def coming(self) -> list[Choice]:
        """Of the next token, by sparse layer."""
        return list(self._next[-1].values())

    def _choices(self) -> dict[int, Choice]:
        """For a token, by layer."""
        choices = {}
        for layer, (residents, others) in self._split.items():
            self._move_on(residents)
            kind = self._kind()
            hits, misses = residents[: kind.hits], self._random.permutation(others)[: kind.misses]
            experts = np.concatenate([hits, misses]).astype(np.int32)
            choices[layer] = Choice(kind, experts, [ExpertKey(layer, int(e)) for e in misses])
        return choices

    def _move_on(self, residents: np.ndarray) -> None:
        """The first `top_k` are those of a token: some give their places to others."""
        spare = len(residents) - self._top_k
        for place in range(self._top_k if spare else 0):
            if self._random.random() >= self._usage.reuse:
                other = self._top_k + int(self._random.integers(spare))
                residents[[place, other]] = residents[[other, place]]

    def _kind(self) -> Kind:
        if self._untried:
            return self._untried.pop()
        first = self._random.random()
        if self._random.random() < self._miss_rate:
            return self.one_missing if first < 0.5 else self.several_missing
        return self.all_there if first < 0.9 else self.fewest

    def fetch(
        self, layer: int, experts: np.ndarray, starts: np.ndarray | None = None
    ) -> Iterator[tuple[Any, np.ndarray]]:
        """Others than were asked for. Where there are fewer, results of the rest are those that
        were computed before."""
        if not self._next:
            return self._of_prompt(layer, len(experts))
        if layer == self._last:
            kind, chosen, misses = self._next.pop()[layer]
        else:
            kind, chosen, misses = self._next[-1][layer]
        self._clock.layer(kind)
        fetch = self._source.fetch(layer, chosen)
        return self._forgetting(fetch, misses) if misses else fetch

    def _forgetting(
        self, fetch: Iterator[tuple[Any, np.ndarray]], misses: list[ExpertKey]
    ) -> Iterator[tuple[Any, np.ndarray]]:
        yield from fetch
        with self.tier.lock:
            for key in misses:
                self.tier.residency.drop(key)
            self.tier.settle()

    def _of_prompt(self, layer: int, count: int) -> Iterator[tuple[Any, np.ndarray]]:
        """As many, but only those that stay."""
        residents, _ = self._split[layer]
        addresses = np.empty((len(residents), 3), np.int64)
        for ready, places in self._source.fetch(layer, residents):
            addresses[np.asarray(ready, np.int64)] = places
        yield range(count), addresses.take(np.arange(count) % len(residents), 0)

    def table(self, layer: int) -> None:
        """Experts are fetched one by one."""
