"""Every layer has an equal share of the room, and evicts its least recently used expert.

Unlike one LRU over all layers it hits below one token cycle: no layer pushes out another's.
"""

from __future__ import annotations

from tiered.cache.shares import Shares
from tiered.policies import Space, lru


class Policy(Shares):
    def __init__(self, space: Space) -> None:
        super().__init__(space, lru.Policy)
