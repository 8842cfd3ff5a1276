"""Adaptive replacement cache: recency and frequency share the room, by which was missed last.

Megiddo and Modha, 2003. Ghosts are keys evicted not long ago; a demand for one says that its list
was too short. Here room is made before `touch` tells who came, so the target moves afterwards.
"""

from __future__ import annotations

from collections import OrderedDict

from tiered.experts import ExpertKey
from tiered.policies import Evictable, Space

Keys = OrderedDict[ExpertKey, None]


class Policy:
    def __init__(self, space: Space) -> None:
        self._room = space.num_slots
        self._target = 0.0  # of the room, for keys used once
        self._once, self._again = Keys(), Keys()
        self._once_ghosts, self._again_ghosts = Keys(), Keys()

    def touch(self, key: ExpertKey) -> None:
        once_ghosts, again_ghosts = self._once_ghosts, self._again_ghosts
        if key in self._again:
            self._again.move_to_end(key)
        elif key in self._once:
            del self._once[key]
            self._again[key] = None
        elif key in once_ghosts:
            step = max(1.0, len(again_ghosts) / len(once_ghosts))
            self._target = min(self._room, self._target + step)
            del once_ghosts[key]
            self._again[key] = None
        elif key in again_ghosts:
            step = max(1.0, len(once_ghosts) / len(again_ghosts))
            self._target = max(0.0, self._target - step)
            del again_ghosts[key]
            self._again[key] = None
        else:
            self._once[key] = None

    def insert(self, key: ExpertKey) -> None:
        self._once_ghosts.pop(key, None)
        self._again_ghosts.pop(key, None)
        self._once[key] = None

    def forget(self, key: ExpertKey) -> None:
        once = key in self._once
        del (self._once if once else self._again)[key]
        ghosts = self._once_ghosts if once else self._again_ghosts
        ghosts[key] = None
        if len(self._once_ghosts) + len(self._again_ghosts) > self._room:
            ghosts.popitem(last=False)

    def victim(self, evictable: Evictable) -> ExpertKey | None:
        first, second = self._once, self._again
        if len(self._once) <= self._target:
            first, second = second, first
        return next(filter(evictable, first), None) or next(filter(evictable, second), None)
