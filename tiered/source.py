"""Where a decoder's experts come from: a RAM tier, or the whole model mapped into memory."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from typing import Any

import numpy as np

from tiered import policies
from tiered.budget import MemoryPlan
from tiered.cache.floors import check_budget
from tiered.config import EngineConfig
from tiered.experts import ExpertKey, ExpertTable
from tiered.fetch import Group
from tiered.simulated.timing import REAL, Timing
from tiered.slots import RamMemory
from tiered.stats import EngineStats
from tiered.store import ExpertStore
from tiered.tier import Journal, Tier
from tiered.whole_blocks import WholeBlocks

log = logging.getLogger("tiered")


class MappedExperts:
    """All experts of a model that fits, computed straight from the file's memory map.

    Nothing is copied: the page cache is the only memory that holds them. Every use is a hit.
    """

    def __init__(self, store: ExpertStore) -> None:
        config = store.checkpoint.config
        self.journal: Journal | None = None
        self.uses = np.zeros((config.num_layers, config.num_experts), np.int64)
        self._tables = {
            layer: ExpertTable(store.address_table(layer), self.uses[layer])
            for layer in config.sparse_layers
        }

    @property
    def hits(self) -> int:
        return int(self.uses.sum())

    def fetch(
        self, layer: int, experts: np.ndarray, starts: np.ndarray | None = None
    ) -> Iterator[tuple[Any, np.ndarray]]:
        addresses, uses = self._tables[layer]
        uses[experts] += 1
        if self.journal is not None:
            keys = [ExpertKey(layer, expert) for expert in experts.tolist()]
            self.journal.fetched(keys, [True] * len(keys))
        yield range(len(experts)), addresses.take(experts, 0)

    def table(self, layer: int) -> ExpertTable | None:
        return self._tables[layer] if self.journal is None else None


class TieredExperts:
    """Experts in the slots of a tier, which loads what is missing."""

    def __init__(self, tier: Tier, offsets: Mapping[int, np.ndarray]) -> None:
        """`offsets`: where gate, up and down lie in a slot, by layer: int64 [num_experts, 3]."""
        self.tier = tier
        self._offsets = {layer: np.ascontiguousarray(table) for layer, table in offsets.items()}
        self._keys = {  # made once: each of them takes half a microsecond
            layer: [ExpertKey(layer, expert) for expert in range(len(table))]
            for layer, table in offsets.items()
        }

    def fetch(
        self, layer: int, experts: np.ndarray, starts: np.ndarray | None = None
    ) -> Iterator[tuple[Any, np.ndarray]]:
        of_layer = self._keys[layer]
        keys = [of_layer[expert] for expert in experts.tolist()]
        with self.tier.fetch(keys) as groups:
            yield from self.addressed(groups, layer, experts)

    def table(self, layer: int) -> None:
        """The tier must know which are used: others may be evicted."""

    def addressed(
        self, groups: Iterable[Group], layer: int, experts: np.ndarray
    ) -> Iterator[tuple[Any, np.ndarray]]:
        """Groups of the tier's places, as ExpertSource.fetch gives them."""
        offsets = self._offsets[layer].take(experts, 0)
        whole = tuple(range(len(experts)))
        for group in groups:
            ready, slots = zip(*group, strict=True)
            within = offsets if ready == whole else offsets.take(ready, 0)
            yield ready, within + np.array(slots, np.int64)[:, None]


def open_source(
    store: ExpertStore,
    blocks: WholeBlocks | None,
    plan: MemoryPlan,
    choices: EngineConfig,
    stack: ExitStack,
    timing: Timing = REAL,
) -> MappedExperts | TieredExperts:
    """What the plan says: the memory map, or a tier, which `stack` closes."""
    below = blocks or store
    space = below.space(plan.slots)
    policy = policies.create(choices.policy, space)  # a wrong name is refused where all fit, too
    if plan.mapped:
        return MappedExperts(store)
    for warning in check_budget(space, store.checkpoint.config.top_k, policy):
        log.warning(warning)
    tier = Tier(
        RamMemory(space),
        blocks or timing.disk(store),
        policy,
        choices.readers,
        make_loaders=timing.make_loaders,
    )
    stack.callback(tier.close)
    return TieredExperts(tier, below.offsets)


def count(source: Any, stats: EngineStats) -> None:
    """Write what a source has counted so far to `stats`."""
    if isinstance(source, MappedExperts):
        stats.hits = source.hits
    elif isinstance(source, TieredExperts):
        tier = source.tier.stats
        stats.hits, stats.misses, stats.bytes_read = tier.hits, tier.misses, tier.bytes_read
        stats.prefetches = tier.prefetches
        stats.prefetches_used = tier.prefetches_used
        stats.prefetches_wasted = tier.prefetches_wasted
