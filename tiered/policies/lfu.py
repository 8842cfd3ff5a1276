"""Evict the least frequently used expert, the older one of equals.

Uses are counted for ever: an expert that comes back has not lost them.
"""

from __future__ import annotations

from tiered.cache.ranking import Ranking
from tiered.experts import ExpertKey
from tiered.policies import Evictable, Space


class Policy:
    def __init__(self, space: Space) -> None:
        self._time = 0
        self._uses: dict[ExpertKey, tuple[int, int]] = {}  # how often, and when last
        self._ranking = Ranking(self._uses)
        self._resident = self._ranking.entered

    def touch(self, key: ExpertKey) -> None:
        self._time = time = self._time + 1
        before = self._uses.get(key)
        self._uses[key] = (before[0] + 1, time) if before else (1, time)
        if key not in self._resident:
            self._ranking.add(key)

    def insert(self, key: ExpertKey) -> None:
        self._uses.setdefault(key, (0, 0))
        self._ranking.add(key)

    def forget(self, key: ExpertKey) -> None:
        self._ranking.remove(key)

    def victim(self, evictable: Evictable) -> ExpertKey | None:
        return self._ranking.lowest(evictable)
