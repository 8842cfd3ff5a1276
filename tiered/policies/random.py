"""Evict any expert: what a policy should at least beat. Seeded, so a replay is exact."""

from __future__ import annotations

from random import Random

from tiered.experts import ExpertKey
from tiered.policies import Evictable, Space


class Policy:
    def __init__(self, space: Space, seed: int = 0) -> None:
        self._random = Random(seed)
        self._keys: list[ExpertKey] = []
        self._index: dict[ExpertKey, int] = {}

    def touch(self, key: ExpertKey) -> None:
        if key not in self._index:
            self._index[key] = len(self._keys)
            self._keys.append(key)

    def forget(self, key: ExpertKey) -> None:
        index, last = self._index.pop(key), self._keys.pop()
        if last != key:  # the last one takes its place
            self._keys[index] = last
            self._index[last] = index

    def victim(self, evictable: Evictable) -> ExpertKey | None:
        for _ in range(32):
            if self._keys and evictable(key := self._random.choice(self._keys)):
                return key
        return next(filter(evictable, self._keys), None)
