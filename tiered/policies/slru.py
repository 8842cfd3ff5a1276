"""Segmented LRU: evict what was used only once first, then the least recently used of the rest.

Karedla, Love, Wherry, 1994. At most `protected` of the room is kept for experts used again.
"""

from __future__ import annotations

from collections import OrderedDict
from itertools import chain

from tiered.experts import ExpertKey
from tiered.policies import Evictable, Space


class Policy:
    def __init__(self, space: Space, protected: float = 0.8) -> None:
        self._room = int(protected * space.num_slots)
        self._once: OrderedDict[ExpertKey, None] = OrderedDict()
        self._again: OrderedDict[ExpertKey, None] = OrderedDict()

    def touch(self, key: ExpertKey) -> None:
        if key in self._again:
            self._again.move_to_end(key)
        elif key in self._once:
            del self._once[key]
            self._again[key] = None
            if len(self._again) > self._room:
                oldest, _ = self._again.popitem(last=False)
                self._once[oldest] = None
        else:
            self._once[key] = None

    def insert(self, key: ExpertKey) -> None:
        self._once[key] = None

    def forget(self, key: ExpertKey) -> None:
        del (self._again if key in self._again else self._once)[key]

    def victim(self, evictable: Evictable) -> ExpertKey | None:
        return next(filter(evictable, chain(self._once, self._again)), None)
