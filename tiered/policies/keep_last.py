"""Keep what each layer used last; beyond that a layer keeps its most used experts.

Nearly half of a token's experts are those of the token before, so a layer's latest batch stays.
The rest competes within its layer by number of uses, where `patience` tokens of age weigh as much
as one use. Layers have equal shares, and a tier that is not full, or a layer that needs less than
its share, lends room to the others.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

from tiered.cache.ranking import Ranking
from tiered.experts import ExpertKey
from tiered.policies import Evictable, Space


class Policy:
    def __init__(self, space: Space, patience: float = 16.0) -> None:
        share = space.capacity / space.num_sparse_layers
        self._blob_bytes = space.blob_bytes
        self._excess = [-share if nbytes else -2 * share for nbytes in space.blob_bytes]
        self._age = 1 / patience
        self._time = [0.0] * space.num_layers  # batches of the layer, as uses
        self._uses: defaultdict[ExpertKey, int] = defaultdict(int)
        self._ranks: dict[ExpertKey, tuple[float, int]] = {}  # uses and time; order among equals
        self._num_ranked = 0
        self._rankings = [Ranking(self._ranks) for _ in space.blob_bytes]
        self._kept: list[dict[ExpertKey, None]] = [{} for _ in space.blob_bytes]

    def batch(self, keys: Sequence[ExpertKey]) -> None:
        """A layer demands these: they take the place of its batch before."""
        layer = keys[0][0]
        kept, wanted = self._kept[layer], set(keys)
        for key in [key for key in kept if key not in wanted]:
            del kept[key]
            self._rank(key)
        self._time[layer] += self._age

    def touch(self, key: ExpertKey) -> None:
        layer = key[0]
        self._uses[key] += 1
        kept = self._kept[layer]
        if key not in kept:
            kept[key] = None
            if key in self._rankings[layer].entered:
                self._rankings[layer].remove(key)
            else:
                self._excess[layer] += self._blob_bytes[layer]

    def insert(self, key: ExpertKey) -> None:
        self._rank(key)
        self._excess[key[0]] += self._blob_bytes[key[0]]

    def forget(self, key: ExpertKey) -> None:
        layer = key[0]
        self._excess[layer] -= self._blob_bytes[layer]
        if key in self._kept[layer]:
            del self._kept[layer][key]
        else:
            self._rankings[layer].remove(key)

    def victim(self, evictable: Evictable) -> ExpertKey | None:
        victim = self._beyond_the_kept(evictable)
        if victim is None:  # a long prompt, or less room than one batch per layer
            for layer in self._greediest():
                kept = filter(evictable, self._kept[layer])
                victim = min(kept, key=self._uses.__getitem__, default=None)
                if victim is not None:
                    break
        return victim

    def victim_for(self, key: ExpertKey, evictable: Evictable) -> ExpertKey | None:
        nbytes = self._blob_bytes[key[0]]
        self._excess[key[0]] += nbytes
        victim = self.victim(evictable)
        self._excess[key[0]] -= nbytes
        return victim

    def surplus(self, layer: int, excess: int, evictable: Evictable) -> ExpertKey | None:
        """The published way of counting exceeds budgets that cannot hold a batch per layer."""
        return self._beyond_the_kept(evictable) if excess > 0 else None

    def _rank(self, key: ExpertKey) -> None:
        """From now on it competes with the others of its layer."""
        self._num_ranked += 1
        self._ranks[key] = self._uses[key] + self._time[key[0]], self._num_ranked
        self._rankings[key[0]].add(key)

    def _beyond_the_kept(self, evictable: Evictable) -> ExpertKey | None:
        first = self._excess.index(max(self._excess))
        victim = self._rankings[first].lowest(evictable)
        if victim is not None:
            return victim
        for layer in self._greediest():
            if self._rankings[layer].entered:
                victim = self._rankings[layer].lowest(evictable)
                if victim is not None:
                    return victim
        return None

    def _greediest(self) -> Iterator[int]:
        """Layers by what they hold above their share, most first."""
        return iter(sorted(range(len(self._excess)), key=self._excess.__getitem__, reverse=True))
