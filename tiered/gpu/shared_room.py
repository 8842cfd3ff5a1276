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

    def hold(self, num_pages: int) -> None:
        space = self.tier.memory.space
        left = self.nbytes - num_pages * self.page_bytes
        count = min(space.num_slots, left // max(space.blob_bytes))
        before = self.tier.residency.num_slots
        if count != before:
            self.tier.use_slots(count)
        if count > before:  # copies into what comes back wait for kernels that may still read it
            self.device.mark()


class SharedRoom:
    """What cards share: see tiered.kv_cache.Room. A context that grows takes slots away, and they
    come back when texts end."""

    def __init__(self, memories: Sequence[SharedMemory]) -> None:
        self.memories = memories

    def hold(self, num_pages: int) -> None:
        for memory in self.memories:
            memory.hold(num_pages)
