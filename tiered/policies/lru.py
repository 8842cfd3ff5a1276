"""Evict the least recently used expert."""

from __future__ import annotations

from collections import OrderedDict

from tiered.experts import ExpertKey
from tiered.policies import Evictable, Space


class Policy:
    def __init__(self, space: Space) -> None:
        self._order: OrderedDict[ExpertKey, None] = OrderedDict()

    def touch(self, key: ExpertKey) -> None:
        order = self._order
        if key in order:
            order.move_to_end(key)
        else:
            order[key] = None

    def forget(self, key: ExpertKey) -> None:
        del self._order[key]

    def victim(self, evictable: Evictable) -> ExpertKey | None:
        for key in self._order:
            if evictable(key):
                return key
        return None
