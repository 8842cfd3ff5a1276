"""Ops that wait for each other and then run in one go.

What Python does between two ops costs as much as some of the ops do. So those of all layers are
queued, and run once a result is wanted; and where nothing but what their records say has changed
for the next token, they are run again without being queued.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np

from cpu_kernels.atomic import call_op, nanoseconds
from cpu_kernels.memory import store_word, word
from cpu_kernels.team import Team, next_op, op

MOST_LINKS = 32  # while more are prepared, workers would fall asleep
TIMED = ("attention", "router", "experts", "head")  # that the time of chains is counted for
OF_ATTENTION, OF_ROUTER, OF_EXPERTS, OF_HEAD = range(4)
NUM_TIMED = len(TIMED)

Resize = Callable[[int], None]


def before_each_run(num_rows: int) -> None:
    """The `resize` of ops whose record is filled each time before they run."""


@op
def _chain(links, thread, num_threads, team):
    """Ops one after the other. `links`: their number, nanoseconds by part, then function, record
    and part of each."""
    begin = nanoseconds()
    for link in range(word(links, 0)):
        at = links + 8 * (1 + NUM_TIMED + 3 * link)
        if link > 0:
            next_op(team)
        call_op(word(at, 0), word(at, 1), thread, num_threads, team)
        if thread == 0:
            end, part = nanoseconds(), 1 + word(at, 2)
            store_word(links, part, word(links, part) + end - begin)
            begin = end


class Chain:
    """Ops for a team of threads, in the order in which they are given to `run` and `queue`."""

    def __init__(self, team: Team) -> None:
        self.num_threads = team.num_threads
        self._team = team
        self._lock = threading.Lock()  # guards the links that wait
        self._open = False
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
        self._run_links = _chain.address  # compiled before the first token

    @contextmanager
    def opened(self, num_rows: int = 1) -> Iterator[None]:
        """Within, ops that are given to `queue` may wait until another is run, or until the end. If
        nothing else was run meanwhile, `again` does the same; they are of `num_rows` rows."""
        self._open, self._tape, self._kept, self._resizes = True, [], None, []
        try:
            yield
            self.finish()
            if self._tape:
                words = [len(self._tape) // 3, *[0] * NUM_TIMED, *self._tape]
                self._kept, self._kept_rows = np.array(words, np.int64), num_rows
                self._kept_words = memoryview(self._kept)
                self._kept_address = self._kept.ctypes.data
        finally:
            self._open, self._num_links = False, 0  # an error leaves nothing behind

    def run(self, function: int, record: int, part: int = OF_EXPERTS) -> None:
        """Run the op at address `function` on all threads, after those that wait; returns when all
        have finished."""
        self._tape = None  # somebody wants to know, and may go on in another way
        if self._num_links:
            self._link(function, record, part)
            self.finish()
        else:
            self._team.run(function, record)

    def queue(
        self, function: int, record: int, part: int = OF_EXPERTS, resize: Resize | None = None
    ) -> None:
        """Run an op now or, in an open chain, later, before others. What it uses must stay as it is
        until then (see `finish`); `take_seconds` counts its time for `part`. `resize`, if there is
        one, makes its record say that there are so many rows, for `Chain.resize`."""
        if not self._open:
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
            self._team.run(self._run_links, self._links_address)

    def finish_batch(self) -> None:
        """Finish, as what all layers know of the batch changes: once a chain, right after the op
        that it begins with, or it cannot be run again."""
        if self._tape is not None and len(self._tape) > 3:
            self._tape = None
        self.finish()

    def forget(self) -> None:
        """Finish, and do not run this chain's ops again, nor the last one's: what they use changes,
        or will with each token."""
        self._tape = self._kept = None
        self.finish()

    @property
    def is_known(self) -> bool:
        """Whether all of the last chain's ops can be run again."""
        return self._kept is not None

    def resize(self, num_rows: int) -> bool:
        """Have the last chain's ops be of so many rows; False: there is one that cannot."""
        if num_rows != self._kept_rows:
            if None in self._resizes:
                return False
            for resize in self._resizes:
                resize(num_rows)  # type: ignore[misc]
            self._kept_rows = num_rows
        return True

    def again(self) -> None:
        """Run the last chain's ops again (see `is_known`), with what their records say now."""
        assert self._kept is not None
        with self._lock:
            self._untold = True
            self._team.run(self._run_links, self._kept_address)

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
