"""Evict the least recently used expert."""

from __future__ import annotations

from collections import OrderedDict

from tiered.experts import ExpertKey
from tiered.policies import Evictable, Space


class Policy:
    def __init__(self, space: Space) -> None:
        self._order: OrderedDict[ExpertKey, None] = OrderedDict()

    def touch(self, key: ExpertKey) -> None:
        self._order[key] = None
        self._order.move_to_end(key)

    def forget(self, key: ExpertKey) -> None:
        del self._order[key]

    def victim(self, evictable: Evictable) -> ExpertKey | None:
        return next(filter(evictable, self._order), None)
