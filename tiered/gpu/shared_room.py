"""Memory of cards that expert slots and the KV cache share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from tiered.tier import Tier


class SharedMemory(NamedTuple):
    """Of one card. Slots begin at its start, pages (see KVCache) at its end."""

    device: Any
    tier: Tier
    nbytes: int
    page_bytes: int

    @property
    def is_wanted(self) -> bool:
        """Whether there are fewer slots than there could be."""
        return self.tier.residency.num_slots < self.tier.memory.space.num_slots

    def hold(self, num_pages: int) -> None:
        space = self.tier.memory.space
        left = self.nbytes - num_pages * self.page_bytes
        count = min(space.num_slots, left // max(space.blob_bytes))
        before = self.tier.residency.num_slots
        if count != before:
            self.tier.use_slots(count)
            # Copies into what comes back wait for kernels that may still read it, and their entries
            # of the table come after those that were taken back.
            self.device.mark()


class SharedRoom:
    """What cards share: see tiered.kv_cache.Room. A context that grows takes slots away, and they
    come back when texts end."""

    def __init__(self, memories: Sequence[SharedMemory]) -> None:
        self.memories = memories

    @property
    def is_wanted(self) -> bool:
        return any(memory.is_wanted for memory in self.memories)

    def hold(self, num_pages: int) -> None:
        for memory in self.memories:
            memory.hold(num_pages)
