"""A team of threads that run one op together, and what an op needs to share the work.

An op is a function `f(record, thread, num_threads, team)` of int64, decorated with `@op` and run
by all threads at once; `record` is the address of its arguments, an int64 struct. Ops must not
raise, and all threads must pass the same barriers. Thread 0 is the caller, so that a team of one
is a plain call. Workers spin for a moment after an op, because the next one usually follows within
microseconds, and then sleep until they are woken: an idle process uses no processor time.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from functools import cached_property
from time import perf_counter

import numpy as np
from numba import types

from cpu_kernels.atomic import (
    atomic_add,
    atomic_exchange,
    atomic_load,
    atomic_store,
    call_op,
    pause,
    yield_processor,
)
from cpu_kernels.cache import compiling
from cpu_kernels.compiler import callback, called, inner
from cpu_kernels.memory import address_of, aligned_bytes

NUM_COUNTERS = 8
PARTS = 8  # of an op's work, for each thread
LEAST_BLOCKS = 4  # of a part, where there are enough for all threads
SPIN_MICROSECONDS = 500.0
MOST_THREADS = 1024  # some thousands exhaust what a process may map, and LLVM then ends it

_LINE = 128  # bytes of a cache line: Apple's, others' are smaller

# Byte offsets in a team's memory. What different threads write lies on different cache lines.
_SEQUENCE = 0  # counts the ops started; the caller writes it last, workers watch it
_FUNCTION = 8
_RECORD = 16
_STOP = 24
_RUNNING = 32
_NUM_THREADS = _LINE
_PATIENCE = _LINE + 8  # pauses before a waiting thread lets others have its core
_DONE = 2 * _LINE  # workers that finished the op
_ARRIVED = 3 * _LINE  # threads that reached the barrier
_GENERATION = 4 * _LINE  # counts the barriers passed
_COUNTERS = 5 * _LINE
_ASLEEP = 6 * _LINE  # one word per thread: 1 if it sleeps, or is about to, and has not been woken


class Op:
    """An op's machine code, compiled (or loaded from the cache) when its address is first used."""

    def __init__(self, function: Callable) -> None:
        self.function = function

    @cached_property
    def address(self) -> int:
        self._code = callback(self.function, 4)
        return self._code.address


def op(function: Callable) -> Op:
    return Op(function)


@inner
def share(total, thread, num_threads):
    """The part [lo, hi) of `total` equal tasks that is this thread's."""
    return total * thread // num_threads, total * (thread + 1) // num_threads


@inner
def next_task(team, counter):
    """Tasks 0, 1, 2, ... of counter 0 to 7, each given to one thread; all start at 0 in an op."""
    return atomic_add(team + _COUNTERS + 8 * counter, 1)


@inner
def restart_tasks(team, counter):
    """The next task of a counter is 0 again: for one thread, and between two barriers."""
    atomic_store(team + _COUNTERS + 8 * counter, 0)


@inner
def parts_of(team, blocks):
    """How many parts to cut so many blocks of work into, for `part_of`. Threads take them one after
    the other, so that a core that is slow, or that others use too, takes fewer."""
    num_threads = atomic_load(team + _NUM_THREADS)
    if num_threads == 1:
        return min(blocks, 1)
    return min(max(num_threads, min(PARTS * num_threads, blocks // LEAST_BLOCKS)), blocks)


@inner
def part_of(team, total, part, num_parts):
    """Part [lo, hi) of `total`. Where there are several for each thread, each is smaller than those
    before it: the last ones let threads end together, and few are small, as to begin one takes
    time."""
    if num_parts < 2 * atomic_load(team + _NUM_THREADS):
        return share(total, part, num_parts)
    left, after, square = num_parts - part, num_parts - part - 1, num_parts * num_parts
    return total - total * left * left // square, total - total * after * after // square


@inner
def _wait_until(address, value, patience):
    num_pauses = 0
    while atomic_load(address) != value:
        if num_pauses < patience:
            pause()
            num_pauses += 1
        else:
            yield_processor()


@inner
def barrier(team):
    """Wait until all threads of the op are here; what they wrote before is then visible."""
    num_threads = atomic_load(team + _NUM_THREADS)
    if num_threads == 1:
        return
    generation = atomic_load(team + _GENERATION)
    if atomic_add(team + _ARRIVED, 1) == num_threads - 1:
        atomic_store(team + _ARRIVED, 0)
        atomic_store(team + _GENERATION, generation + 1)
    else:
        _wait_until(team + _GENERATION, generation + 1, atomic_load(team + _PATIENCE))


@inner
def next_op(team):
    """A barrier, after which tasks of all counters start at 0 again: what follows is like another
    op."""
    num_threads = atomic_load(team + _NUM_THREADS)
    generation = atomic_load(team + _GENERATION)
    if atomic_add(team + _ARRIVED, 1) == num_threads - 1:
        for counter in range(NUM_COUNTERS):
            atomic_store(team + _COUNTERS + 8 * counter, 0)
        atomic_store(team + _ARRIVED, 0)
        atomic_store(team + _GENERATION, generation + 1)
    else:
        _wait_until(team + _GENERATION, generation + 1, atomic_load(team + _PATIENCE))


@called()
def _start(team, function, record):
    for counter in range(NUM_COUNTERS):
        atomic_store(team + _COUNTERS + 8 * counter, 0)
    atomic_store(team + _DONE, 0)
    atomic_store(team + _FUNCTION, function)
    atomic_store(team + _RECORD, record)
    atomic_store(team + _RUNNING, 1)
    atomic_add(team + _SEQUENCE, 1)


@called(nogil=True)
def _finish(team):
    """Do thread 0's part of the op that was started, if one was, and wait for the others."""
    if atomic_load(team + _RUNNING) == 0:
        return
    num_threads = atomic_load(team + _NUM_THREADS)
    function = atomic_load(team + _FUNCTION)
    call_op(function, atomic_load(team + _RECORD), 0, num_threads, team)
    _wait_until(team + _DONE, num_threads - 1, atomic_load(team + _PATIENCE))
    atomic_store(team + _RUNNING, 0)


@called(nogil=True)
def _run_if_awake(team, function, record):
    """Start an op and finish it; or only start it and return False, where workers must be woken."""
    _start(team, function, record)
    # A worker that falls asleep sets its word and then looks at the sequence; we do it the other
    # way round, so one of the two sees the other.
    for thread in range(1, atomic_load(team + _NUM_THREADS)):
        if atomic_load(team + _ASLEEP + 8 * thread) != 0:
            return False
    _finish(team)
    return True


@called(nogil=True)
def _work(team, thread, seen, patience):
    """Run ops as they come; returns the last one's number when none came for a while, -1 to end."""
    while True:
        num_pauses = 0
        while atomic_load(team + _SEQUENCE) == seen:
            if num_pauses >= patience:
                return seen
            pause()
            num_pauses += 1
        if atomic_load(team + _STOP) != 0:
            return -1
        seen += 1
        num_threads = atomic_load(team + _NUM_THREADS)
        function = atomic_load(team + _FUNCTION)
        call_op(function, atomic_load(team + _RECORD), thread, num_threads, team)
        atomic_add(team + _DONE, 1)


@called()
def _fall_asleep(team, thread, seen):
    """True: the thread must now wait on its semaphore. False: there is work."""
    atomic_exchange(team + _ASLEEP + 8 * thread, 1)
    if atomic_load(team + _SEQUENCE) == seen:
        return True
    # An op came meanwhile. If the caller has taken our word, its release must be consumed.
    return atomic_exchange(team + _ASLEEP + 8 * thread, 0) == 0


@called()
def _take_sleeper(team, thread):
    return atomic_exchange(team + _ASLEEP + 8 * thread, 0) == 1


@called(nogil=True)
def _pauses(count):
    for _ in range(count):
        pause()


def _pauses_per_microsecond() -> float:
    """Measured, because a pause takes from 5 to 150 cycles, depending on the processor."""
    _pauses(1)
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter_ns()
        _pauses(2000)
        best = min(best, time.perf_counter_ns() - start)
    return 2000 / max(best / 1000, 1e-3)


class Team:
    """`num_threads` threads: the caller's and `num_threads - 1` of its own, until `close`.

    Calls of `run` from several Python threads take turns. `spin_microseconds` is how long a worker
    watches for the next op before it sleeps.
    """

    def __init__(self, num_threads: int, spin_microseconds: float = SPIN_MICROSECONDS) -> None:
        if not 1 <= num_threads <= MOST_THREADS:
            raise ValueError(f"a team has 1 to {MOST_THREADS} threads, not {num_threads}")
        if spin_microseconds < 0:
            raise ValueError(f"spin_microseconds must not be negative, is {spin_microseconds}")
        self.num_threads = num_threads
        self._memory = aligned_bytes(_ASLEEP + 8 * num_threads, _LINE)
        self._address = address_of(self._memory)
        pauses_per_microsecond = _pauses_per_microsecond() if num_threads > 1 else 0.0
        self._set(_NUM_THREADS, num_threads)
        self._set(_PATIENCE, int(50 * pauses_per_microsecond))
        patience = int(spin_microseconds * pauses_per_microsecond)
        self._lock = threading.Lock()
        with compiling():  # the machine code itself: to look for it takes as long as to run it
            _run_if_awake.compile((types.int64,) * 3)
        self._run_if_awake = _run_if_awake.get_overload((types.int64,) * 3)
        self._closed = False
        self.seconds = 0.0  # spent in ops, so far
        self._semaphores = [threading.Semaphore(0) for _ in range(num_threads)]
        self._threads = [
            threading.Thread(
                target=_worker,
                args=(self._address, thread, patience, self._semaphores[thread]),
                name=f"cpu_kernels-{thread}",
                daemon=True,  # a process that forgets to close us must still end
            )
            for thread in range(1, num_threads)
        ]
        for thread in self._threads:
            thread.start()

    def run(self, function: int, record: int) -> None:
        """Run the op at address `function` on all threads; returns when all have finished."""
        self._lock.acquire()  # half the price of `with`, and this runs several times per layer
        try:
            self._run(function, record)
        finally:
            self._lock.release()

    def _run(self, function: int, record: int) -> None:
        finished = False
        start = perf_counter()
        try:
            if self._closed:
                finished = True
                raise ValueError("this team of threads is closed")
            finished = self._run_if_awake(self._address, function, record)
        finally:  # also when Ctrl-C arrives while the op waits for workers to wake up
            if not finished:
                self._wake()
                _finish(self._address)
            self.seconds += perf_counter() - start

    def close(self) -> None:
        """End the threads. Closing twice is harmless."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._set(_STOP, 1)
            _start(self._address, 0, 0)
            self._wake()
        for thread in self._threads:
            thread.join()

    def _wake(self) -> None:
        for thread in range(1, self.num_threads):
            if _take_sleeper(self._address, thread):
                self._semaphores[thread].release()

    def _set(self, offset: int, value: int) -> None:
        self._memory[offset : offset + 8].view(np.int64)[0] = value

    def __enter__(self) -> Team:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _worker(team: int, thread: int, patience: int, semaphore: threading.Semaphore) -> None:
    seen = 0
    while (seen := _work(team, thread, seen, patience)) >= 0:
        if _fall_asleep(team, thread, seen):
            semaphore.acquire()
