"""Evict the expert whose next use is farthest away: the best that any policy could do.

It has to know the future: every demand of a recorded trace, in order. For replay only. Belady,
1966.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterable

from tiered.cache.ranking import Ranking
from tiered.experts import ExpertKey
from tiered.policies import Evictable, Space

NEVER = float("inf")


class Policy:
    def __init__(self, space: Space, future: Iterable[Iterable[ExpertKey]] = ()) -> None:
        self._uses: defaultdict[ExpertKey, deque[int]] = defaultdict(deque)
        for time, keys in enumerate(future):
            for key in keys:
                self._uses[key].append(time)
        if not self._uses:
            raise ValueError("belady has to know the future: use it to replay a trace")
        self._rank: dict[ExpertKey, float] = {}  # minus the time of the next use
        self._ranking = Ranking(self._rank)

    def touch(self, key: ExpertKey) -> None:
        if self._uses[key]:
            self._uses[key].popleft()
        if key in self._ranking.entered:
            self._ranking.remove(key)
        self.insert(key)

    def insert(self, key: ExpertKey) -> None:
        self._rank[key] = -(self._uses[key][0] if self._uses[key] else NEVER)
        self._ranking.add(key)

    def forget(self, key: ExpertKey) -> None:
        self._ranking.remove(key)

    def victim(self, evictable: Evictable) -> ExpertKey | None:
        return self._ranking.lowest(evictable)
