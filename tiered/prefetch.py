"""Look-ahead: load what the next layers are likely to want, while this one computes.

A later layer's router, applied to this layer's hidden state, names most of the experts that it
will choose when its turn comes. Guesses are ranked, the nearest layer first, and read with what
bandwidth demand leaves.
"""

from __future__ import annotations

from collections import defaultdict
from typing import NamedTuple

import numpy as np

from tiered.experts import ExpertKey, Routing
from tiered.governor import Allowance, Always
from tiered.tier import Tier

MOST_OBSERVED = 2048  # guesses that are kept before they are scored together


class Accuracy(NamedTuple):
    """How well guesses matched what the router chose."""

    routed: int = 0  # experts that were chosen
    named: int = 0  # ... and had been guessed for the same token
    tokens: int = 0
    whole: int = 0  # tokens of which every expert had been guessed

    def __add__(self, other: tuple[int, ...]) -> Accuracy:  # type: ignore[override]
        return Accuracy(*(a + b for a, b in zip(self, other, strict=True)))

    @property
    def slot_overlap(self) -> float:
        """The share of chosen experts that had been guessed."""
        return self.named / max(1, self.routed)


def accuracy(guess: np.ndarray, chosen: np.ndarray) -> Accuracy:
    """Compare expert ids, both [num_tokens, top_k] (a guess may have more columns)."""
    found = (chosen[:, :, None] == guess[:, None, :]).any(axis=2)  # [num_tokens, top_k]
    return Accuracy(found.size, int(found.sum()), len(found), int(found.all(axis=1).sum()))


class Prefetcher:
    """Turns guesses into prefetches of one tier, at most `distance` layers ahead.

    `allowance`: how many guesses may be loaded per layer now.

    Call `distances` for a layer, `submit` a guess for each, and `observe` what a layer's router
    really chose.
    """

    def __init__(
        self, tier: Tier, num_layers: int, distance: int = 1, allowance: Allowance | None = None
    ) -> None:
        if distance < 0:
            raise ValueError(f"distance must be 0 or more layers, not {distance}")
        self.tier = tier
        self.num_layers = num_layers
        self.distance = distance
        self.allowance = allowance or Always()
        self._accuracy: defaultdict[tuple[int, int], Accuracy] = defaultdict(Accuracy)
        self._observed: list[tuple[tuple[int, int], np.ndarray, np.ndarray]] = []  # to be scored
        self._layer = 0  # being computed
        self._wanted: dict[int, list[ExpertKey]] = {}  # by layer, ranked
        self._guesses: dict[int, dict[int, np.ndarray]] = {}  # by layer and distance

    def distances(self, layer: int) -> range:
        """How many layers ahead to guess from this one; empty if look-ahead is off."""
        if layer <= self._layer:  # the next token begins
            self._wanted.clear()
            self._guesses.clear()
        self._layer = layer
        if self.allowance.limit() == 0:
            return range(0)
        return range(1, min(self.distance, self.num_layers - 1 - layer) + 1)

    def submit(self, layer: int, guess: Routing) -> None:
        """Layer `layer` is likely to want these experts: [num_tokens, any number of ranks]."""
        self._guesses.setdefault(layer, {})[layer - self._layer] = guess.experts
        self._wanted[layer] = [ExpertKey(layer, expert) for expert in ranked(guess)]
        ahead = sorted(target for target in self._wanted if target > self._layer)
        self.tier.prefetch(
            [key for target in ahead for key in self._wanted[target]],
            limit=self.allowance.limit() * len(ahead),
        )

    def observe(self, layer: int, routing: Routing) -> None:
        """What the layer's router chose: score the guesses that were made for it."""
        for distance, guess in self._guesses.pop(layer, {}).items():
            if len(guess) == len(routing.experts):
                self._observed.append(((layer, distance), guess, routing.experts))
        if len(self._observed) >= MOST_OBSERVED:
            self._score()

    @property
    def accuracy(self) -> dict[tuple[int, int], Accuracy]:
        """How well guesses matched, by layer and distance."""
        self._score()
        return dict(self._accuracy)

    def _score(self) -> None:
        """Not while a layer waits for its experts, but for many guesses at a time."""
        together: defaultdict[tuple[int, ...], list[tuple[np.ndarray, np.ndarray]]]
        together = defaultdict(list)
        observed, self._observed = self._observed, []
        for place, guess, chosen in observed:
            together[*place, guess.shape[1], chosen.shape[1]].append((guess, chosen))
        for (layer, distance, *_), pairs in together.items():
            guesses, choices = map(np.concatenate, zip(*pairs, strict=True))
            self._accuracy[layer, distance] += accuracy(guesses, choices)


def ranked(guess: Routing) -> list[int]:
    """Distinct experts, the one with the largest sum of weights first."""
    if len(guess.experts) == 1:
        order = np.argsort(-guess.weights[0], kind="stable")
        best: list[int] = guess.experts[0, order].tolist()
        return best
    experts, where = np.unique(guess.experts, return_inverse=True)
    weights = np.bincount(where.reshape(-1), guess.weights.reshape(-1))
    best = experts[np.argsort(-weights, kind="stable")].tolist()
    return best
