"""A team of threads that run one op together, and what an op needs to share the work.

An op is a function `f(record, thread, num_threads, team)` of int64, decorated with `@op` and run
by all threads at once; `record` is the address of its arguments, an int64 struct. Ops must not
raise, and all threads must pass the same barriers. Thread 0 is the caller, so that a team of one
is a plain call. Workers spin for a moment after an op, because the next one usually follows within
microseconds, and then sleep until they are woken: an idle process uses no processor time.

Ops can also wait for each other (`Team.chain`), and then run in one go: what Python does between
two of them costs as much as some of the ops do.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
    nanoseconds,
    pause,
    yield_processor,
)
from cpu_kernels.cache import compiling
from cpu_kernels.compiler import callback, called, inner
from cpu_kernels.memory import address_of, aligned_bytes, store_word, word

NUM_COUNTERS = 8
PARTS = 8  # of an op's work, for each thread
LEAST_BLOCKS = 4  # of a part, where there are enough for all threads
SPIN_MICROSECONDS = 500.0
MOST_THREADS = 1024  # some thousands exhaust what a process may map, and LLVM then ends it
MOST_LINKS = 32  # of a chain; while more are prepared, workers would fall asleep
TIMED = ("attention", "router", "experts", "head")  # that the time of chains is counted for
OF_ATTENTION, OF_ROUTER, OF_EXPERTS, OF_HEAD = range(4)
NUM_TIMED = len(TIMED)

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


Resize = Callable[[int], None]


def before_each_run(num_rows: int) -> None:
    """The `resize` of ops whose record is filled each time before they run."""


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
def _next_op(team):
    """A barrier, after which tasks of all counters start at 0 again."""
    num_threads = atomic_load(team + _NUM_THREADS)
    generation = atomic_load(team + _GENERATION)
    if atomic_add(team + _ARRIVED, 1) == num_threads - 1:
        for counter in range(NUM_COUNTERS):
            atomic_store(team + _COUNTERS + 8 * counter, 0)
        atomic_store(team + _ARRIVED, 0)
        atomic_store(team + _GENERATION, generation + 1)
    else:
        _wait_until(team + _GENERATION, generation + 1, atomic_load(team + _PATIENCE))


@op
def _chain(links, thread, num_threads, team):
    """Ops one after the other. `links`: their number, nanoseconds by part, then function, record
    and part of each."""
    begin = nanoseconds()
    for link in range(word(links, 0)):
        at = links + 8 * (1 + NUM_TIMED + 3 * link)
        if link > 0:
            _next_op(team)
        call_op(word(at, 0), word(at, 1), thread, num_threads, team)
        if thread == 0:
            end, part = nanoseconds(), 1 + word(at, 2)
            store_word(links, part, word(links, part) + end - begin)
            begin = end


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
        self._chaining = False
        self._num_links = 0
        self._tape: list[int] | None = None  # the links of this chain
        self._resizes: list[Resize | None] = []  # of its ops
        self._kept_rows = 0
        self._kept: np.ndarray | None = None  # as `_links`, but of the whole last chain
        self._kept_words = memoryview(np.zeros(1 + NUM_TIMED, np.int64))
        self._untold = False  # whether chains have run since `take_seconds`
        self._links = np.zeros(1 + NUM_TIMED + 3 * (MOST_LINKS + 1), np.int64)
        self._link_words = memoryview(self._links)
        self._links_address = self._links.ctypes.data
        self._chain = _chain.address  # compiled before the first token
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

    def run(self, function: int, record: int, part: int = OF_EXPERTS) -> None:
        """Run the op at address `function` on all threads, after those that wait; returns when all
        have finished."""
        self._tape = None  # somebody wants to know, and may go on in another way
        if self._num_links:
            self._link(function, record, part)
            self.finish()
            return
        self._lock.acquire()  # half the price of `with`, and this runs several times per layer
        try:
            self._run(function, record)
        finally:
            self._lock.release()

    @contextmanager
    def chain(self, num_rows: int = 1) -> Iterator[None]:
        """Within, ops that are given to `queue` may wait until another is run, or until the end. If
        nothing else was run meanwhile, `again` does the same; they are of `num_rows` rows."""
        self._chaining, self._tape, self._kept, self._resizes = True, [], None, []
        try:
            yield
            self.finish()
            if self._tape:
                words = [len(self._tape) // 3, *[0] * NUM_TIMED, *self._tape]
                self._kept, self._kept_rows = np.array(words, np.int64), num_rows
                self._kept_words = memoryview(self._kept)
                self._kept_address = self._kept.ctypes.data
        finally:
            self._chaining, self._num_links = False, 0  # an error leaves nothing behind

    def again(self) -> None:
        """Run the last chain's ops again (see `is_known`), with what their records say now."""
        assert self._kept is not None
        with self._lock:
            self._untold = True
            self._run(self._chain, self._kept_address)

    def resize(self, num_rows: int) -> bool:
        """Have the last chain's ops be of so many rows; False: there is one that cannot."""
        if num_rows != self._kept_rows:
            if None in self._resizes:
                return False
            for resize in self._resizes:
                resize(num_rows)  # type: ignore[misc]
            self._kept_rows = num_rows
        return True

    def finish_batch(self) -> None:
        """Finish, as what all layers know of the batch changes: once a chain, right after the op
        that it begins with, or it cannot be run again."""
        if self._tape is not None and len(self._tape) > 3:
            self._tape = None
        self.finish()

    @property
    def is_known(self) -> bool:
        """Whether all of the last chain's ops can be run again."""
        return self._kept is not None

    def forget(self) -> None:
        """Finish, and do not run this chain's ops again, nor the last one's: what they use changes,
        or will with each token."""
        self._tape = self._kept = None
        self.finish()

    def queue(
        self, function: int, record: int, part: int = OF_EXPERTS, resize: Resize | None = None
    ) -> None:
        """Run an op now or, in a chain, later, before others. What it uses must stay as it is until
        then (see `finish`); `take_seconds` counts its time for `part`. `resize`, if there is one,
        makes its record say that there are so many rows, for `Team.resize`."""
        if not self._chaining:
            self._kept_rows = 0  # the record may be one of the last chain's, and of other rows now
            self.run(function, record, part)
            return
        if self._tape is not None:
            self._tape += function, record, part
            self._resizes.append(resize)
        self._link(function, record, part)
        if self._num_links == MOST_LINKS:
            self.finish()

    def finish(self) -> None:
        """Run what waits: to be called before records or memory that it uses are written to."""
        if not self._num_links:
            return
        with self._lock:
            self._links[0], self._num_links = self._num_links, 0
            self._untold = True
            self._run(self._chain, self._links_address)

    def take_seconds(self) -> dict[str, float]:
        """Seconds that the ops of chains took since the last call, by part; empty if none has."""
        if not self._untold:
            return {}
        self._untold = False
        seconds = dict.fromkeys(TIMED, 0.0)
        for words in (self._link_words, self._kept_words):
            for place, part in enumerate(TIMED, 1):
                seconds[part] += words[place] / 1e9
                words[place] = 0
        return seconds

    def _link(self, function: int, record: int, part: int) -> None:
        with self._lock:
            at, words = 1 + NUM_TIMED + 3 * self._num_links, self._link_words
            words[at], words[at + 1], words[at + 2] = function, record, part
            self._num_links += 1

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
