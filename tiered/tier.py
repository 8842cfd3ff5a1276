"""Tier: experts in the slots of one memory, each loaded on demand, or on a guess, from a source.

Bookkeeping is synchronous: who is resident and who is evicted is decided in the caller's thread,
when it asks, and never depends on how fast the disk is. Only the bytes arrive later. Weights never
change, so evicting an expert only frees its slot.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any, Protocol

import numpy as np

from tiered.cache.residency import Residency, TierStats
from tiered.experts import ExpertKey
from tiered.fetch import Fetch, Pins
from tiered.loaders import Load, Loaders, Loads, State
from tiered.policies import Policy
from tiered.slots import Memory


class Source(Protocol):
    """Where a tier reads experts from: the store on disk, or another tier."""

    def read_into(self, key: ExpertKey, buffer: Any) -> None:
        """Fill `buffer` with the expert's blob. Called from several threads; raises OSError."""


class Journal(Protocol):
    """Told what changes residency, in order; a replay of it gives the same hits and misses."""

    def fetched(self, keys: Sequence[ExpertKey], resident: Sequence[bool]) -> None: ...

    def prefetched(
        self, keys: Sequence[ExpertKey], limit: int, given_up: Sequence[ExpertKey]
    ) -> None: ...

    def dropped(self, key: ExpertKey) -> None: ...

    def cut_short(self, num_asked: int) -> None:
        """The fetch in pieces ended early: only so many of its keys were looked up."""


class Tier:
    """An expert cache over one memory. Thread-safe; close it (or use `with`) to end its threads.

    The lock guards bookkeeping, never a read.
    """

    def __init__(
        self,
        memory: Memory,
        source: Source,
        policy: Policy,
        loaders: int = 4,
        journal: Journal | None = None,
        make_loaders: Callable[..., Loads] = Loaders,
    ) -> None:
        self.memory = memory
        self.source = source
        self.journal = journal
        self.residency = Residency(memory.space, policy)
        self.closed = False
        self.lock = threading.Lock()
        self._changed = threading.Condition(self.lock)  # a load ended, or pins were released
        self._num_waiting = 0
        self.active: list[Pins] = []  # one for each fetch that has not ended
        self.loaders = make_loaders(self._read, self._finished, self.lock, loaders)
        self.loads: dict[int, Load] = {}  # by slot: under way, or failed as a guess
        self.places = [memory.place(slot) for slot in range(memory.space.num_slots)]
        self.latest: Sequence[ExpertKey] = ()  # what the latest fetch asked for

    @property
    def stats(self) -> TierStats:
        with self.lock:
            return self.residency.stats.copy()

    def __contains__(self, key: ExpertKey) -> bool:
        return key in self.residency

    def __len__(self) -> int:
        return len(self.residency)

    def __repr__(self) -> str:
        space = self.memory.space
        return f"<Tier: {len(self)} experts, {self.residency.used} of {space.capacity} bytes>"

    def fetch(self, keys: Sequence[ExpertKey]) -> Fetch:
        """Demand distinct experts: iterate over groups of (position in `keys`, place of its blob).

        Everything is looked up, and what is missing is being loaded, when this returns. A group
        holds what is ready: first all hits, then misses as they arrive. Keys that do not fit
        together come in pieces, in an order of the tier's choice. Places stay valid until the
        iterator ends, is closed, or (in pieces) goes on to the next piece. Raises OSError naming
        the expert that could not be read. A thread must end one fetch before it begins another.
        """
        self.latest = keys
        if self.journal is not None:
            self.journal.fetched(keys, [key in self.residency for key in keys])
        return Fetch(self, keys)

    @contextmanager
    def pinned(self, key: ExpertKey) -> Iterator[Any]:
        """The place of one expert's blob, not evicted until the block ends."""
        with self.fetch([key]) as groups:
            ((_, place),) = next(groups)
            yield place

    @contextmanager
    def lent(self, key: ExpertKey, buffer: Any) -> Iterator[Any]:
        """One expert's blob for the tier above: where it lies, if a GPU can copy it from there,
        else a copy in `buffer`. It stays as it is until the block ends."""
        nbytes = self.memory.space.nbytes(key)
        with self.fetch([key]) as groups:
            next(groups)
            slot = self.residency.slot(key)
            blob = self.memory.slot(slot)
            if not self.memory.is_locked(slot):
                np.copyto(buffer[:nbytes], blob[:nbytes])
                groups.close()
                blob = buffer
            yield blob

    def prefetch(
        self,
        keys: Sequence[ExpertKey],
        limit: int | None = None,
        staying: Collection[ExpertKey] = (),
    ) -> list[ExpertKey]:
        """Start loading at most `limit` of `keys`, best first, in case they are demanded soon.

        Replaces earlier guesses that have not been started. Never evicts what is pinned, what the
        latest fetch asked for, one of `keys` or of `staying`. Returns what is being loaded for it.
        """
        with self.lock:
            if not self.loads and all(map(self.residency.__contains__, keys)):
                return []  # the usual case by far: nothing to load, nothing to give up
            if self.closed or any(pins.in_pieces for pins in self.active):
                return []  # in pieces, every slot is spoken for
            wanted = set(keys)
            given_up = [
                load.key for load in self.loaders.waiting_guesses() if load.key not in wanted
            ]
            for key in given_up:
                self.residency.cancel(key)
            self.settle()
            limit = len(keys) if limit is None else limit
            also = {*self.latest, *self.pinned_keys(), *staying}
            issued = self.residency.guess(keys, limit, also)
            for key in issued:
                self.start(key, self.residency.slot(key), demand=False)
            self.settle()
            if self.journal is not None:
                self.journal.prefetched(keys, limit, given_up)
            return issued

    def resident(self) -> list[ExpertKey]:
        """What is in the slots now, or on its way there."""
        with self.lock:
            return self.residency.keys

    def resize(self, capacity: int) -> None:
        """Use `capacity` bytes from now on, at most what the tier was made with.

        Between two fetches only. Memory of slots that become empty is given back, once nobody
        copies from this memory.
        """
        with self.lock:
            while self.active:
                self.wait()
            self.residency.resize(capacity, lambda key: True)
            vacated = list(self.residency.vacated)
            self.settle()
            for slot in vacated:
                self.memory.give_back(slot)

    def use_slots(self, count: int) -> None:
        """Use slots 0 ... count - 1 from now on, in a memory whose slots are all alike.

        Between two fetches only. When this returns, nothing writes to the others any more: whoever
        was there is evicted, and reads that were under way have ended.
        """
        with self.lock:
            given_up = range(count, self.residency.num_slots)
            self.residency.use_slots(count)
            self.settle()
            while self.loaders.is_reading_into(given_up):
                self.wait()
            for slot in given_up:
                self.memory.give_back(slot)

    def close(self) -> None:
        """End the loader threads and release the memory; whoever waits gets a RuntimeError."""
        with self.lock:
            if self.closed:
                return
            self.closed = True
            self.notify()
        self.loaders.close()
        self.memory.close()

    def __enter__(self) -> Tier:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # The rest is for Fetch, and called with the lock held.

    def pinned_keys(self) -> set[ExpertKey]:
        return set(chain.from_iterable([pins.keys for pins in self.active]))

    def wait(self) -> None:
        """Until a load has ended, or pins were released."""
        self._num_waiting += 1
        self.loaders.wait(self._changed)
        self._num_waiting -= 1

    def notify(self) -> None:
        if self._num_waiting:
            self._changed.notify_all()

    def start(self, key: ExpertKey, slot: int, demand: bool) -> Load:
        """Queue the read of an expert into the slot it was given."""
        if (before := self.loads.get(slot)) is not None:
            self.loaders.cancel(before)  # its expert has lost the slot
        self.loads[slot] = load = Load(key, slot, demand)
        self.loaders.put(load)
        return load

    def drop(self, failed: Load) -> None:
        """Forget an expert whose demanded load failed."""
        if self.loads.get(failed.slot) is failed:
            del self.loads[failed.slot]
            self.residency.drop(failed.key)
            self.settle()
            if self.journal is not None:
                self.journal.dropped(failed.key)

    def settle(self) -> None:
        """Nobody wants the bytes of vacated slots."""
        if not self.residency.vacated:
            return
        for slot in self.residency.vacated:
            load = self.loads.pop(slot, None)
            if load is not None:
                self.loaders.cancel(load)
            self.memory.fit(slot, 0)
        self.residency.recycle()

    def _read(self, load: Load) -> None:
        self.memory.fit(load.slot, self.memory.space.nbytes(load.key))
        self.source.read_into(load.key, self.memory.slot(load.slot))

    def _finished(self, load: Load) -> None:
        if load.state is State.DONE:
            del self.loads[load.slot]
        elif load.state is State.CANCELLED:
            if load.slot not in self.loads:
                self.memory.fit(load.slot, 0)
        else:
            self.residency.stats.failures += 1
        self.notify()
