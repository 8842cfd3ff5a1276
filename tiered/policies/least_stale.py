"""Evict what is stale first: experts that the present token has not used and will not use soon.

The layer computed last is needed again only after all others, so stale experts give way in that
order, the least recently used of a layer first. After Least-Stale of SpecMD (Hoang et al., 2026).
"""

from __future__ import annotations

from collections import OrderedDict
from itertools import chain

from tiered.experts import ExpertKey
from tiered.policies import Evictable, Space


class Policy:
    def __init__(self, space: Space) -> None:
        self._layers: list[OrderedDict[ExpertKey, int]] = [OrderedDict() for _ in space.blob_bytes]
        self._layer = 0  # being computed
        self._token = 0  # counts passes over the layers

    def touch(self, key: ExpertKey) -> None:
        if key.layer < self._layer:
            self._token += 1
        self._layer = key.layer
        self.insert(key)

    def insert(self, key: ExpertKey) -> None:
        self._layers[key.layer][key] = self._token
        self._layers[key.layer].move_to_end(key)

    def forget(self, key: ExpertKey) -> None:
        del self._layers[key.layer][key]

    def victim(self, evictable: Evictable) -> ExpertKey | None:
        fresh = []
        last_needed_first = chain(
            range(self._layer, -1, -1), range(len(self._layers) - 1, self._layer, -1)
        )
        for layer in last_needed_first:
            key = next(filter(evictable, self._layers[layer]), None)
            if key is not None:
                if layer > self._layer or self._layers[layer][key] < self._token:
                    return key
                fresh.append(key)
        return fresh[0] if fresh else None
