"""Where a decoder's experts come from: a RAM tier, or the whole model mapped into memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from tiered.experts import ExpertKey
from tiered.store import ExpertStore
from tiered.tier import Journal, Tier


class MappedExperts:
    """All experts of a model that fits, computed straight from the file's memory map.

    Nothing is copied: the page cache is the only memory that holds them. Every use is a hit.
    """

    def __init__(self, store: ExpertStore) -> None:
        self.hits = 0
        self.journal: Journal | None = None
        self._addresses = {
            layer: store.address_table(layer)  # int64 [num_experts, 3]
            for layer in store.checkpoint.config.sparse_layers
        }

    def fetch(
        self, layer: int, experts: np.ndarray, starts: np.ndarray | None = None
    ) -> Iterator[tuple[Any, np.ndarray]]:
        self.hits += len(experts)
        if self.journal is not None:
            keys = [ExpertKey(layer, expert) for expert in experts.tolist()]
            self.journal.fetched(keys, [True] * len(keys))
        yield range(len(experts)), self._addresses[layer][experts]


class TieredExperts:
    """Experts in the slots of a tier, which loads what is missing."""

    def __init__(self, tier: Tier, offsets: Mapping[int, np.ndarray]) -> None:
        """`offsets`: where gate, up and down lie in a slot, by layer: int64 [num_experts, 3]."""
        self.tier = tier
        self._offsets = offsets

    def fetch(
        self, layer: int, experts: np.ndarray, starts: np.ndarray | None = None
    ) -> Iterator[tuple[Any, np.ndarray]]:
        offsets = self._offsets[layer][experts]
        keys = [ExpertKey(layer, expert) for expert in experts.tolist()]
        with self.tier.fetch(keys) as groups:
            for group in groups:
                ready, slots = zip(*group, strict=True)
                yield ready, np.array(slots, np.int64)[:, None] + offsets[list(ready)]
