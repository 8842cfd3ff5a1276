"""Every layer has an equal share of the room, and evicts its least frequently used expert."""

from __future__ import annotations

from tiered.cache.shares import Shares
from tiered.policies import Space, lfu


class Policy(Shares):
    def __init__(self, space: Space) -> None:
        super().__init__(space, lfu.Policy)
