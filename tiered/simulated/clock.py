"""A clock whose time passes only when something is waited for."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class VirtualClock:
    """Calling it tells the seconds so far. One thread at a time moves it."""

    def __init__(self) -> None:
        self.now = 0.0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._count = itertools.count()
        self._is_aside = False

    def __call__(self) -> float:
        return self.now

    def at(self, time: float, effect: Callable[[], None]) -> None:
        """Something happens when time reaches `time`."""
        heapq.heappush(self._events, (time, next(self._count), effect))

    def advance_to(self, time: float) -> None:
        """Wait until then; what happens meanwhile happens in order."""
        while not self._is_aside and self._events and self._events[0][0] <= time:
            at, _, effect = heapq.heappop(self._events)
            self.now = max(self.now, at)
            effect()
        self.now = max(self.now, time)

    @contextmanager
    def aside(self) -> Iterator[None]:
        """What is done within goes on beside everything else: nothing happens meanwhile, and
        afterwards it is as late as before."""
        before = self.now, self._is_aside
        self._is_aside = True
        try:
            yield
        finally:
            self.now, self._is_aside = before
