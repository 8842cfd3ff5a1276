"""Loaders: the threads that read experts into slots. Demand goes first, guesses come after."""

from __future__ import annotations

import enum
import threading
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


class Loaders:
    """Runs `read(load)` for queued loads, several at once, never two into the same slot.

    All methods but `close` are called with `lock` held; `read` runs without it and `finished`
    with it. At most `depth` loads are read at a time, and half of these may be guesses, so that
    demand finds a free thread.
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
        self._work = threading.Condition(lock)
        self._demand: deque[Load] = deque()
        self._guesses: deque[Load] = deque()
        self._guesses_reading = 0
        self._busy: set[int] = set()  # slots being read into
        self._parked: dict[int, Load] = {}  # by slot: starts when the slot is no longer busy
        self._closing = False
        self._threads = [
            threading.Thread(target=self._run, name=f"tiered-loader-{i}", daemon=True)
            for i in range(num_threads)
        ]
        for thread in self._threads:
            thread.start()

    def put(self, load: Load) -> None:
        (self._demand if load.demand else self._guesses).append(load)
        self._work.notify()

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

    def close(self) -> None:
        """Let the running reads end, forget the rest, and end the threads."""
        with self._lock:
            self._closing = True
            self._demand.clear()
            self._guesses.clear()
            self._work.notify_all()
        for thread in self._threads:
            thread.join()

    def _run(self) -> None:
        with self._lock:
            while (load := self._next()) is not None:
                load.state = State.READING
                self._busy.add(load.slot)
                speculative = not load.demand
                self._guesses_reading += speculative
                self._lock.release()
                error: Exception | None = None
                try:
                    self._read(load)
                except Exception as failure:  # whatever it is, it belongs to who waits for it
                    error = failure
                self._lock.acquire()
                self._guesses_reading -= speculative
                self._busy.discard(load.slot)
                if load.state is State.READING:
                    load.state, load.error = (State.FAILED if error else State.DONE), error
                self._finished(load)
                parked = self._parked.pop(load.slot, None)
                if parked is not None:
                    self.put(parked)
                del load, error, parked

    def _next(self) -> Load | None:
        """Wait for a load that may start; None: the end."""
        while not self._closing:
            depth = min(self.depth.limit(), self.num_threads)
            load = None
            if len(self._busy) < depth:
                load = self._pop(self._demand)
                if load is None and self._guesses_reading < max(1, depth // 2):
                    load = self._pop(self._guesses)
            if load is not None:
                return load
            self._work.wait()
        return None

    def _pop(self, queue: deque[Load]) -> Load | None:
        while queue:
            load = queue.popleft()
            if load.state is not State.QUEUED:  # cancelled, or promoted and started
                continue
            if load.slot not in self._busy:
                return load
            self._parked[load.slot] = load
        return None
