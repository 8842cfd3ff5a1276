"""Evict the expert with the fewest uses; each counts half as much `half_life` tokens later.

Between LRU (short half-life) and LFU (long): LRFU of Lee et al., 2001. All scores fade alike, so
only their order matters, and that changes only with a use: log2 of the sum of 2^(time of use).
"""

from __future__ import annotations

from math import exp2, log2

from tiered.cache.ranking import Ranking
from tiered.experts import ExpertKey
from tiered.policies import Evictable, Space


class Policy:
    def __init__(self, space: Space, half_life: float = 32.0) -> None:
        self._step = 1 / (half_life * space.num_sparse_layers)
        self._time = 0.0  # in half-lives
        self._layer = -1
        self._scores: dict[ExpertKey, float] = {}
        self._ranking = Ranking(self._scores)

    def touch(self, key: ExpertKey) -> None:
        self.score(key)
        if key not in self._ranking.entered:
            self._ranking.add(key)

    def score(self, key: ExpertKey) -> None:
        """Count a use."""
        if key.layer != self._layer:
            self._layer = key.layer
            self._time += self._step
        before = self._scores.get(key)
        self._scores[key] = self._time + (
            log2(1 + exp2(before - self._time)) if before is not None else 0.0
        )

    def insert(self, key: ExpertKey) -> None:
        self._scores.setdefault(key, self._time - 1)  # half a use
        self._ranking.add(key)

    def forget(self, key: ExpertKey) -> None:
        self._ranking.remove(key)

    def victim(self, evictable: Evictable) -> ExpertKey | None:
        return self._ranking.lowest(evictable)
