"""How long something was busy, and what each of its requests took: measured while it happens."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Clock = Callable[[], float]


class Busy:
    """Adds up the seconds in which something is under way, once, however many are. Thread-safe."""

    def __init__(self, clock: Clock = time.perf_counter) -> None:
        self.clock = clock
        self._lock = threading.Lock()
        self._total = self._since = 0.0
        self._num_running = 0

    def __call__(self) -> float:
        """Seconds until now."""
        with self._lock:
            running = self.clock() - self._since if self._num_running else 0.0
            return self._total + running

    @contextmanager
    def running(self) -> Iterator[None]:
        self._add(1)
        try:
            yield
        finally:
            self._add(-1)

    def _add(self, count: int) -> None:
        with self._lock:
            now = self.clock()
            if self._num_running:
                self._total += now - self._since
            self._since = now
            self._num_running += count


class Channel:
    """A link that serves requests one after the other. Tells `observe` the bytes of each, its
    seconds without those in which it waited for others, and the share of them (0 to 1) in which
    `rival`, which wants the same memory, was busy, too."""

    def __init__(self, observe: Callable[[float, float, float], None], rival: Busy) -> None:
        self.busy = Busy(rival.clock)
        self._observe, self._rival = observe, rival
        self._lock = threading.Lock()
        self._free = float("-inf")  # when the latest request ended

    @contextmanager
    def request(self, nbytes: float) -> Iterator[None]:
        clock, begin, before = self.busy.clock, self.busy.clock(), self._rival()
        with self.busy.running():
            yield  # one that failed tells nothing
        with self._lock:
            end = clock()
            seconds = end - max(begin, self._free)
            self._free = end
            if seconds > 0:
                overlap = (self._rival() - before) / (end - begin)
                self._observe(nbytes, seconds, min(1.0, overlap))
