"""A described disk: bytes come from a real file, at its speed."""

from __future__ import annotations

from typing import Any

from tiered.experts import ExpertKey
from tiered.planning.machine import Machine
from tiered.simulated.clock import VirtualClock
from tiered.store import ExpertStore


class SimulatedDisk:
    """The source of a tier in RAM: reads from `store`, which takes what `machine` says."""

    def __init__(self, store: ExpertStore, machine: Machine, clock: VirtualClock) -> None:
        self._store, self._machine, self._clock = store, machine, clock

    def read_into(self, key: ExpertKey, buffer: Any) -> None:
        before = self._store.bytes_read
        self._store.read_into(key, buffer)
        nbytes = self._store.bytes_read - before
        self._clock.advance_to(self._machine.read(nbytes, self._clock.now))
