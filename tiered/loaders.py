"""Loaders: the threads that read experts into slots. Demand goes first, guesses come after."""

from __future__ import annotations

import enum
import threading
from abc import abstractmethod
from collections import deque
from collections.abc import Callable

from tiered.experts import ExpertKey
from tiered.governor import Allowance, Always


class State(enum.Enum):
    QUEUED = "queued"
    READING = "reading"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"


class Load:
    """One expert on its way into a slot. Its fields change under the tier's lock only."""

    __slots__ = ("demand", "error", "key", "slot", "state")

    def __init__(self, key: ExpertKey, slot: int, demand: bool) -> None:
        self.key = key
        self.slot = slot
        self.demand = demand  # somebody waits for it
        self.state = State.QUEUED
        self.error: Exception | None = None


class Loads:
    """Which loads wait, and which are read: several at once, never two into the same slot.

    All methods but `close` are called with `lock` held; `read` runs without it in threads, and
    `finished` with it. At most `depth` loads are read at a time, and half of these may be guesses,
    so that demand finds a free thread.
    """

    def __init__(
        self,
        read: Callable[[Load], None],
        finished: Callable[[Load], None],
        lock: threading.Lock,
        num_threads: int,
    ) -> None:
        if num_threads < 1:
            raise ValueError(f"num_threads must be at least 1, not {num_threads}")
        self.num_threads = num_threads
        self.depth: Allowance = Always()
        self._read = read
        self._finished = finished
        self._lock = lock
        self._demand: deque[Load] = deque()
        self._guesses: deque[Load] = deque()
        self._busy: set[int] = set()  # slots being read into
        self._guessed: set[int] = set()  # those whose read began as a guess
        self._parked: dict[int, Load] = {}  # by slot: starts when the slot is no longer busy

    @abstractmethod
    def queued(self) -> None:
        """A load has come, or may start now."""

    @abstractmethod
    def wait(self, changed: threading.Condition) -> None:
        """Until something has changed in the tier whose condition this is."""

    @abstractmethod
    def close(self) -> None:
        """Let the running reads end, and forget the rest."""

    def put(self, load: Load) -> None:
        (self._demand if load.demand else self._guesses).append(load)
        self.queued()

    def promote(self, load: Load) -> None:
        """Somebody waits for this guess now."""
        if not load.demand:
            load.demand = True
            if load.state is State.QUEUED:  # its place among the guesses is skipped later
                self.put(load)

    def waiting_guesses(self) -> list[Load]:
        """Guesses that have not been started."""
        parked = [load for load in self._parked.values() if not load.demand]
        waiting = [*self._guesses, *parked]
        return [load for load in waiting if load.state is State.QUEUED and not load.demand]

    def cancel(self, load: Load) -> None:
        """Nobody wants it any more. If it is being read already, the read runs to its end.

        One that has ended stays as it is: who waited for it has yet to see that it failed.
        """
        if load.state in (State.QUEUED, State.READING):
            load.state = State.CANCELLED

    def is_reading_into(self, slots: range) -> bool:
        return any(slot in slots for slot in self._busy)

    # The rest is for those who read.

    def clear(self) -> None:
        self._demand.clear()
        self._guesses.clear()

    def take(self) -> Load | None:
        """A load that may start now."""
        load, depth = None, min(self.depth.limit(), self.num_threads)
        if len(self._busy) < depth:
            load = self._pop(self._demand)
            if load is None and len(self._guessed) < max(1, depth // 2):
                load = self._pop(self._guesses)
        return load

    def begin(self, load: Load) -> None:
        load.state = State.READING
        self._busy.add(load.slot)
        if not load.demand:
            self._guessed.add(load.slot)

    def attempt(self, load: Load) -> Exception | None:
        """Read; whatever goes wrong belongs to who waits for it."""
        try:
            self._read(load)
        except Exception as failure:
            return failure
        return None

    def end(self, load: Load, error: Exception | None) -> None:
        self._guessed.discard(load.slot)
        self._busy.discard(load.slot)
        if load.state is State.READING:
            load.state, load.error = (State.FAILED if error else State.DONE), error
        self._finished(load)
        parked = self._parked.pop(load.slot, None)
        if parked is not None:
            self.put(parked)

    def _pop(self, queue: deque[Load]) -> Load | None:
        while queue:
            load = queue.popleft()
            if load.state is not State.QUEUED:  # cancelled, or promoted and started
                continue
            if load.slot not in self._busy:
                return load
            self._parked[load.slot] = load
        return None


class Loaders(Loads):
    """Threads that read."""

    def __init__(
        self,
        read: Callable[[Load], None],
        finished: Callable[[Load], None],
        lock: threading.Lock,
        num_threads: int,
    ) -> None:
        super().__init__(read, finished, lock, num_threads)
        self._work = threading.Condition(lock)
        self._closing = False
        self._threads = [
            threading.Thread(target=self._run, name=f"tiered-loader-{i}", daemon=True)
            for i in range(num_threads)
        ]
        for thread in self._threads:
            thread.start()

    def queued(self) -> None:
        self._work.notify()

    def wait(self, changed: threading.Condition) -> None:
        changed.wait()

    def close(self) -> None:
        """Let the running reads end, forget the rest, and end the threads."""
        with self._lock:
            self._closing = True
            self.clear()
            self._work.notify_all()
        for thread in self._threads:
            thread.join()

    def _run(self) -> None:
        with self._lock:
            while (load := self._next()) is not None:
                self.begin(load)
                self._lock.release()
                error = self.attempt(load)
                self._lock.acquire()
                self.end(load, error)
                del load, error

    def _next(self) -> Load | None:
        """Wait for a load that may start; None: the end."""
        while not self._closing:
            if (load := self.take()) is not None:
                return load
            self._work.wait()
        return None
