"""Evict the least used expert of all layers, recent uses counting more, but keep what each layer
used last.

Nearly half of a token's experts are those of the token before, so every layer keeps its latest
batch. The rest of the room goes to the layers that make most of it: all experts compete by the
number of their uses, each counting half as much `half_life` tokens later (lfu_decay).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from tiered.experts import ExpertKey
from tiered.policies import Evictable, Space, lfu_decay


class Policy(lfu_decay.Policy):
    def __init__(self, space: Space, half_life: float = 16.0) -> None:
        super().__init__(space, half_life)
        self._latest: list[Collection[ExpertKey]] = [()] * space.num_layers  # batch by layer
        self._kept: set[ExpertKey] = set()  # resident, and of a latest batch

    def batch(self, keys: Sequence[ExpertKey]) -> None:
        """A layer demands these: they take the place of its batch before."""
        layer = keys[0].layer
        wanted = set(keys)
        for key in self._latest[layer]:
            if key in self._kept and key not in wanted:
                self._kept.discard(key)
                self._ranking.add(key)
        self._latest[layer] = keys

    def touch(self, key: ExpertKey) -> None:
        self.score(key)
        if key not in self._kept:
            self._kept.add(key)
            if key in self._ranking:
                self._ranking.remove(key)

    def forget(self, key: ExpertKey) -> None:
        if key in self._kept:
            self._kept.discard(key)
        else:
            self._ranking.remove(key)

    def victim(self, evictable: Evictable) -> ExpertKey | None:
        """If only latest batches are left, the one needed last gives way."""
        victim = self._ranking.lowest(evictable)
        if victim is None:
            victim = min(filter(evictable, self._kept), key=self._scores.__getitem__, default=None)
        return victim

    def surplus(self, layer: int, excess: int, evictable: Evictable) -> ExpertKey | None:
        """The published way of counting exceeds budgets that cannot hold a batch per layer."""
        return self._ranking.lowest(evictable) if excess > 0 else None
