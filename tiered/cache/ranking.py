"""Ranking: resident experts in order of a rank, for policies that evict the lowest."""

from __future__ import annotations

from heapq import heapify, heappop, heappush
from typing import Any

from tiered.experts import ExpertKey
from tiered.policies import Evictable


class Ranking:
    """Evicts the lowest of `ranks[key]`, a dict that its owner keeps up to date.

    A rank may only rise while its key is resident. So the heap needs no update on a use: an entry
    whose key has risen since is put back at its true place when it comes up.
    """

    def __init__(self, ranks: dict[ExpertKey, Any]) -> None:
        self._ranks = ranks
        self._heap: list[tuple[Any, ExpertKey]] = []
        self.entered: dict[ExpertKey, Any] = {}  # resident keys, and their rank in the heap

    def add(self, key: ExpertKey) -> None:
        rank = self.entered[key] = self._ranks[key]
        heappush(self._heap, (rank, key))

    def remove(self, key: ExpertKey) -> None:
        del self.entered[key]
        if len(self._heap) > 64 + 4 * len(self.entered):  # mostly entries of keys that left
            self._heap = [(rank, key) for key, rank in self.entered.items()]
            heapify(self._heap)

    def lowest(self, evictable: Evictable) -> ExpertKey | None:
        """The evictable key of the lowest rank."""
        heap, entered, ranks = self._heap, self.entered, self._ranks
        passed_over = []
        found = None
        while heap:
            entry = heap[0]
            rank, key = entry
            if entered.get(key) != rank:  # its key has left, or came back with another rank
                heappop(heap)
            elif ranks[key] != rank:
                heappop(heap)
                self.add(key)
            elif evictable(key):
                found = key
                break
            else:
                passed_over.append(heappop(heap))
        for entry in passed_over:
            heappush(heap, entry)
        return found
