"""The live picture: which expert is in which tier, and what happens to it."""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import AsyncGenerator, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil

from tiered.experts import ExpertKey, ExpertTable
from tiered.kv_cache import PAGE_SIZE
from tiered.model import ExpertSource
from tiered.serve.scheduler import Scheduler
from tiered.source import MappedExperts, TieredExperts

if TYPE_CHECKING:
    from tiered.engine import Engine

FRAME_SECONDS = 0.25
# A cell of the grid is a byte: its tier, and what happened to it since the last frame.
DISK, RAM, MAPPED = 0, 1, 2
HIT, MISS = 4, 8


class WatchedExperts:
    """Another source, and how often each expert was found (`hits`) or had to be read (`misses`)."""

    def __init__(self, source: ExpertSource, num_layers: int, num_experts: int) -> None:
        self.source = source
        self.tier = source.tier if isinstance(source, TieredExperts) else None
        self.hits, self.misses = np.zeros((2, num_layers, num_experts), np.int64)
        self._counts_itself = isinstance(source, MappedExperts)
        if isinstance(source, MappedExperts):
            self.hits = source.uses

    def fetch(
        self, layer: int, experts: np.ndarray, starts: np.ndarray | None = None
    ) -> Iterator[tuple[Any, np.ndarray]]:
        if self.tier is not None:
            there = [ExpertKey(layer, expert) in self.tier for expert in experts.tolist()]
            self.hits[layer, experts] += there
            self.misses[layer, experts] += np.logical_not(there)
        elif not self._counts_itself:
            self.hits[layer, experts] += 1
        return self.source.fetch(layer, experts, starts)

    def table(self, layer: int) -> ExpertTable | None:
        return self.source.table(layer)


class Live:
    """What an engine does at the moment. Watches its expert source from now on."""

    def __init__(self, engine: Engine, scheduler: Scheduler) -> None:
        self.engine = engine
        self.scheduler = scheduler
        self.config = engine.checkpoint.config  # with a layer that drafts, where it is used
        self.watched: WatchedExperts | None = None
        if engine.decoder.source is not None:
            source, config = engine.decoder.source, self.config
            self.watched = WatchedExperts(source, config.num_layers, config.num_experts)
            for decoder in engine.generation.decoders:
                decoder.source = self.watched

    def description(self) -> dict[str, Any]:
        """What does not change."""
        config, plan = self.config, self.engine.plan
        return {
            "layers": config.sparse_layers,
            "experts": config.num_experts,
            "top_k": config.top_k,
            "mapped": plan.mapped,
            "architecture": config.model_type,
            "policy": self.engine.choices.policy,
            "context": self.engine.context,
            "bytes": {
                "dense": plan.dense,
                "kv": plan.kv,
                "experts": plan.experts,
                "slots": plan.slots,
                "limit": plan.limit,
            },
        }

    def settings(self) -> dict[str, Any]:
        """What can be changed while running."""
        prefetcher, tier = self.engine.prefetcher, self.tier
        return {
            "look_ahead": prefetcher.distance if prefetcher else None,
            "max_running": self.scheduler.max_running,
            "expert_ram": tier.residency.space.capacity if tier else None,
            "expert_ram_limit": tier.residency.largest_capacity if tier else None,
        }

    @property
    def tier(self) -> Any:
        return self.watched.tier if self.watched else None

    def numbers(self) -> dict[str, Any]:
        """Counts and gauges of this moment."""
        engine, scheduler = self.engine, self.scheduler
        counts, stats = scheduler.counts, engine.stats
        prefetcher = engine.prefetcher
        routed = named = 0
        for score in list(prefetcher.accuracy.values()) if prefetcher else []:
            routed, named = routed + score.routed, named + score.named
        tier = self.tier
        return {
            "time": time.monotonic(),
            "running": len(scheduler.running),
            "waiting": len(scheduler.waiting),
            "prompt_tokens": counts.prompt_tokens,
            "cached_tokens": counts.cached_tokens,
            "new_tokens": counts.new_tokens,
            "hits": stats.hits,
            "misses": stats.misses,
            "bytes_read": stats.bytes_read,
            "prefetches": stats.prefetches,
            "prefetches_used": stats.prefetches_used,
            "routed": routed,
            "named": named,
            "governors": [
                {
                    "name": governor.name,
                    "chosen": governor.chosen,
                    "label": governor.label(governor.chosen) if governor.labels else "",
                    "limits": governor.limits,
                    "is_probing": governor.is_probing,
                    "benefit": governor.benefit,
                }
                for governor in engine.governors
            ],
            "ram_bytes": tier.residency.used if tier else 0,
            **engine.gpu_facts(),
            "process_bytes": psutil.Process().memory_info().rss,
            "kv_used": engine.kv.num_pages * PAGE_SIZE - engine.kv.free_tokens,
            "kv_tokens": engine.kv.num_pages * PAGE_SIZE,
        }

    def grid(self, before: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
        """A cell for each expert of each sparse layer: uint8 [num_layers, num_experts]."""
        assert self.watched is not None
        shape = self.watched.hits.shape
        cells = np.full(shape, DISK if self.tier else MAPPED, np.uint8)
        if self.tier:
            resident = self.tier.resident()
            if resident:
                layers, experts = np.array(resident).T
                cells[layers, experts] = RAM
        cells |= np.where(self.watched.hits != before[0], HIT, 0).astype(np.uint8)
        cells |= np.where(self.watched.misses != before[1], MISS, 0).astype(np.uint8)
        return cells[self.config.sparse_layers]

    def counts(self) -> tuple[np.ndarray, np.ndarray]:
        assert self.watched is not None
        return self.watched.hits.copy(), self.watched.misses.copy()

    async def frames(self) -> AsyncGenerator[dict[str, Any], None]:
        """A frame now, and another every FRAME_SECONDS."""
        before = self.counts() if self.watched else None
        while True:
            frame: dict[str, Any] = {"numbers": self.numbers(), "settings": self.settings()}
            if before is not None:
                frame["grid"] = base64.b64encode(self.grid(before).tobytes()).decode()
                before = self.counts()
            yield frame
            await asyncio.sleep(FRAME_SECONDS)
