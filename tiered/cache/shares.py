"""Shares: the room of a tier divided among layers, each with an eviction order of its own."""

from __future__ import annotations

from collections.abc import Callable

from tiered.experts import ExpertKey
from tiered.policies import Evictable, Policy, Space


class Shares:
    """A policy made of one per layer. A layer at its share makes room itself.

    Room that a layer does not use is lent: only a full tier takes from who has more than a share.
    """

    def __init__(self, space: Space, layer_policy: Callable[[Space], Policy]) -> None:
        self.nbytes = space.nbytes
        equal = space.capacity / space.num_sparse_layers
        self.share = [equal if nbytes else 0.0 for nbytes in space.blob_bytes]  # bytes by layer
        self.used = [0] * space.num_layers
        self.policies = [layer_policy(space) for _ in space.blob_bytes]
        self.resident: set[ExpertKey] = set()

    def touch(self, key: ExpertKey) -> None:
        if key not in self.resident:
            self._enter(key)
        self.policies[key[0]].touch(key)

    def insert(self, key: ExpertKey) -> None:
        self._enter(key)
        policy = self.policies[key[0]]
        getattr(policy, "insert", policy.touch)(key)

    def forget(self, key: ExpertKey) -> None:
        self.resident.discard(key)
        self.used[key[0]] -= self.nbytes(key)
        self.policies[key[0]].forget(key)

    def surplus(self, layer: int, excess: int, evictable: Evictable) -> ExpertKey | None:
        """In the published way of counting a layer never has more than its share, nothing lent."""
        return self.policies[layer].victim(evictable) if self.excess(layer) > 0 else None

    def excess(self, layer: int) -> float:
        """Bytes that the layer holds above its share."""
        return self.used[layer] - self.share[layer]

    def victim(self, evictable: Evictable) -> ExpertKey | None:
        return self._of_the_greediest(evictable)

    def victim_for(self, key: ExpertKey, evictable: Evictable) -> ExpertKey | None:
        layer = key[0]
        if self.excess(layer) + self.nbytes(key) > 0:
            victim = self.policies[layer].victim(evictable)
            if victim is not None:
                return victim
        return self._of_the_greediest(evictable)

    def _enter(self, key: ExpertKey) -> None:
        self.resident.add(key)
        self.used[key[0]] += self.nbytes(key)

    def _of_the_greediest(self, evictable: Evictable) -> ExpertKey | None:
        for layer in sorted(range(len(self.used)), key=self.excess, reverse=True):
            victim = self.policies[layer].victim(evictable) if self.used[layer] else None
            if victim is not None:
                return victim
        return None
