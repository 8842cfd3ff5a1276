"""Loads of a tier on a virtual clock: nothing depends on how fast this machine is."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from tiered.loaders import Load, Loads
from tiered.simulated.clock import VirtualClock


class Reading(NamedTuple):
    """A load whose bytes are here, and count as arrived when the clock reaches `end`."""

    load: Load
    error: Exception | None
    end: float


class SimulatedLoaders(Loads):
    """What `Loaders` does with threads: `read` runs at once, in the thread that asks for it, and
    what it takes is how far it moves the clock."""

    def __init__(
        self,
        clock: VirtualClock,
        read: Callable[[Load], None],
        finished: Callable[[Load], None],
        lock: threading.Lock,
        num_threads: int,
    ) -> None:
        super().__init__(read, finished, lock, num_threads)
        self._clock = clock
        self._reading: dict[int, Reading] = {}  # by slot

    def wait(self, changed: threading.Condition) -> None:
        """Move the clock on until one of the loads that somebody waits for has ended."""
        under_way = list(self._reading.values())
        demanded = [reading for reading in under_way if reading.load.demand]
        if not under_way:
            changed.wait()
            return
        first = min(demanded or under_way, key=lambda reading: reading.end)
        self._lock.release()
        try:
            self._clock.advance_to(first.end)
        finally:
            self._lock.acquire()
        self._arrive(first.load)  # beside everything else, nothing has happened

    def close(self) -> None:
        with self._lock:
            self.clear()
            self._reading.clear()

    def queued(self) -> None:
        while (load := self.take()) is not None:
            self.begin(load)
            with self._clock.aside():
                error = self.attempt(load)
                end = self._clock.now
            self._reading[load.slot] = Reading(load, error, end)
            self._clock.at(end, partial(self._arrive_locked, load))

    def _arrive_locked(self, load: Load) -> None:
        with self._lock:
            self._arrive(load)

    def _arrive(self, load: Load) -> None:
        reading = self._reading.get(load.slot)
        if reading is not None and reading.load is load:
            del self._reading[load.slot]
            self.end(load, reading.error)
            self.queued()
