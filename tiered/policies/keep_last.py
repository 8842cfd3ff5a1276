"""Keep what each layer used last; the rest of all layers competes for what is left.

Nearly half of a token's experts are those of the token before, so a layer's latest batch stays.
Beyond that, experts leave in order of their number of uses, where `patience` tokens of age weigh as
much as one use. But no layer is pushed below half (`floor`) of the experts that it has ever used,
nor below an equal share if that is less: with little room, even shares do better than counts.

A prompt wants most experts of each layer, one layer after the other. What it wants in later layers
must not leave before they come, only to be read again: those of layers that it has passed leave
first.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

from tiered.cache.ranking import Ranking
from tiered.experts import ExpertKey
from tiered.policies import Evictable, Space


class Policy:
    def __init__(self, space: Space, patience: float = 5.0, floor: float = 0.5) -> None:
        self._nbytes = space.nbytes
        self._share = space.capacity / space.num_sparse_layers
        self._floor = floor
        self._held = [0] * space.num_layers  # bytes
        self._floors = [0.0] * space.num_layers  # bytes that no other layer may take
        self._age = 1 / patience
        self._time = [0.0] * space.num_layers  # batches of the layer, as uses
        self._uses: defaultdict[ExpertKey, int] = defaultdict(int)
        self._ranks: dict[ExpertKey, tuple[float, int]] = {}  # uses and time; order among equals
        self._num_ranked = 0
        self._rankings = [Ranking(self._ranks) for _ in space.blob_bytes]
        self._kept: list[dict[ExpertKey, None]] = [{} for _ in space.blob_bytes]
        self._num_used = [0] * space.num_layers  # experts, ever
        self._passed = 0  # layers of a prompt that is being computed

    def batch(self, keys: Sequence[ExpertKey]) -> None:
        """A layer demands these: they take the place of its batch before."""
        layer = keys[0][0]
        kept, wanted = self._kept[layer], set(keys)
        for key in [key for key in kept if key not in wanted]:
            del kept[key]
            self._rank(key)
        self._time[layer] += self._age
        self._passed = layer + 1 if 2 * len(keys) > self._num_used[layer] else 0

    def touch(self, key: ExpertKey) -> None:
        layer = key[0]
        self._uses[key] += 1
        if self._uses[key] == 1:
            floor = self._floors[layer] + self._floor * self._nbytes(key)
            self._floors[layer] = min(floor, self._share)
            self._num_used[layer] += 1
        kept = self._kept[layer]
        if key not in kept:
            kept[key] = None
            ranking = self._rankings[layer]
            if key in ranking.entered:
                ranking.remove(key)
            else:
                self._held[layer] += self._nbytes(key)

    def insert(self, key: ExpertKey) -> None:
        self._rank(key)
        self._held[key[0]] += self._nbytes(key)

    def forget(self, key: ExpertKey) -> None:
        layer = key[0]
        self._held[layer] -= self._nbytes(key)
        if key in self._kept[layer]:
            del self._kept[layer][key]
        else:
            self._rankings[layer].remove(key)

    def victim(self, evictable: Evictable) -> ExpertKey | None:
        layers = range(len(self._held))
        return self._beyond_the_kept(evictable) or self._of_the_greediest(layers, evictable)

    def victim_for(self, key: ExpertKey, evictable: Evictable) -> ExpertKey | None:
        layer, nbytes = key[0], self._nbytes(key)
        victim = self._of_the_greediest(range(self._passed), evictable)
        if victim is not None:
            return victim
        self._held[layer] += nbytes
        victim = self.victim(evictable)
        self._held[layer] -= nbytes
        return victim

    def surplus(self, layer: int, excess: int, evictable: Evictable) -> ExpertKey | None:
        """The published way of counting exceeds budgets that cannot hold a batch per layer."""
        return self._beyond_the_kept(evictable) if excess > 0 else None

    def _rank(self, key: ExpertKey) -> None:
        """From now on it competes with the others."""
        self._num_ranked += 1
        self._ranks[key] = self._uses[key] + self._time[key[0]], self._num_ranked
        self._rankings[key[0]].add(key)

    def _beyond_the_kept(self, evictable: Evictable) -> ExpertKey | None:
        layers = range(len(self._held))
        above = [layer for layer in layers if self._held[layer] > self._floors[layer]]
        return self._lowest(above, evictable) or self._lowest(layers, evictable)

    def _lowest(self, layers: Iterable[int], evictable: Evictable) -> ExpertKey | None:
        """The first to leave of these layers, beyond what they keep."""
        rankings = [self._rankings[layer] for layer in layers]
        firsts = [ranking.lowest(evictable) for ranking in rankings if ranking.entered]
        return min(filter(None, firsts), key=self._ranks.__getitem__, default=None)

    def _of_the_greediest(self, layers: Iterable[int], evictable: Evictable) -> ExpertKey | None:
        """The first to leave of the one of these layers that holds most, also of what it keeps."""
        for layer in sorted(layers, key=self._held.__getitem__, reverse=True):
            victim = self._lowest([layer], evictable)
            if victim is None:
                kept = filter(evictable, self._kept[layer])
                victim = min(kept, key=self._uses.__getitem__, default=None)
            if victim is not None:
                return victim
        return None
