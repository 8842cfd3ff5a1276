"""Continuous batching: requests join and leave between two tokens, and share each fetched expert.

One thread owns the engine. A step computes one token of every running request together, and then,
unless prompts have just taken their time, a chunk of one prompt.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from tiered.serve.batcher import Batcher
from tiered.serve.counts import Counts
from tiered.serve.fair_queue import FairQueue
from tiered.serve.job import Job
from tiered.serve.prefix import PrefixCache
from tiered.serve.request import Event, Request
from tiered.serve.room import has_room

if TYPE_CHECKING:
    from tiered.engine import Engine

PATIENCE = 0.1  # seconds; so long a chunk of a prompt is no loss to those who decode


class Busy(RuntimeError):
    """The queue is full, or the server is about to end: try again later."""


class Scheduler:
    """Answers requests with one engine. Close it (or use `with`) to end its thread.

    At most `max_running` requests are computed at once, and `max_waiting` wait; a forward pass
    decodes at most `decode_rows` of them (see Batcher), default: the backend's `few_rows`.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        max_running: int = 16,
        max_waiting: int = 256,
        decode_rows: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.engine = engine
        self.max_running = max_running
        self.max_waiting = max_waiting
        self.clock = clock
        self.waiting: FairQueue[Job] = FairQueue()
        self._batcher = Batcher(engine, decode_rows or engine.backend.few_rows, clock)
        self._owed = 0.0  # seconds that prompts took from those who decode
        self._arrived = 0
        self._draining = False
        self._closed = False
        self._calls: list[Callable[[], None]] = []
        self._wake = threading.Condition()  # guards waiting, _calls and the flags
        self._thread: threading.Thread | None = None

    @property
    def counts(self) -> Counts:
        return self._batcher.counts

    @property
    def running(self) -> list[Job]:
        return self._batcher.running

    @property
    def prefixes(self) -> PrefixCache:
        return self._batcher.prefixes

    # --- for any thread ---

    def submit(
        self,
        request: Request,
        on_event: Callable[[Event], None],
        loop: asyncio.AbstractEventLoop | None = None,
    ) -> Job:
        """Queue a request; `on_event` is called in `loop`, or else in the scheduler's thread, last
        with a Finish.

        Raises ValueError for a prompt that cannot be computed, Busy if there is no room to wait.
        """
        self.engine.checked(request.ids)
        if loop is not None:
            on_event = self._batcher.outbox.to(on_event, loop)
        with self._wake:
            if self._draining or self._closed:
                raise Busy("the server is shutting down")
            if len(self.waiting) >= self.max_waiting:
                raise Busy(f"{self.max_waiting} requests are waiting already: try again later")
            self._arrived += 1
            job = Job(request, self.engine.tokenizer, on_event, self._arrived, self.clock())
            self.waiting.push(request.client, job)
            self._wake.notify_all()
        return job

    def cancel(self, job: Job) -> None:
        with self._wake:
            job.cancel()
            self._wake.notify_all()

    def call(self, action: Callable[[], None]) -> None:
        """Run something in the scheduler's thread, between two steps: it owns the engine."""
        with self._wake:
            self._calls.append(action)
            self._wake.notify_all()

    def drain(self) -> None:
        """Accept nothing any more, and wait until all that was accepted is answered."""
        with self._wake:
            self._draining = True
            while (self.waiting or self.running or self._batcher.preempted) and self.is_alive:
                self._wake.wait()

    @property
    def is_alive(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def start(self) -> None:
        """Start the thread."""
        self._thread = threading.Thread(target=self._run, name="tiered-scheduler", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Cancel what is running or waiting, end the thread and give all pages back."""
        with self._wake:
            self._closed = True
            self._wake.notify_all()
        if self._thread is not None:
            self._thread.join()
        for job in [*self.running, *self.waiting]:
            job.cancel()
        self._drop()
        self._batcher.outbox.send()
        self.prefixes.clear()

    def __enter__(self) -> Scheduler:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- for the thread ---

    def _run(self) -> None:
        while True:
            with self._wake:
                while not (self._closed or self._calls or self.waiting or self.running):
                    self._wake.notify_all()  # whoever drains
                    self._wake.wait()
                if self._closed:
                    return
                calls, self._calls = self._calls, []
            for action in calls:
                action()
            start = self.clock()
            self.step()
            self.counts.busy_seconds += self.clock() - start

    def step(self) -> None:
        """One token for each request that decodes, with prompts that are short enough to share the
        forward pass; then perhaps a chunk of one prompt.

        Who decodes gets half of the time: what a chunk took longer than PATIENCE is owed to them.
        """
        self._drop()
        self._admit()
        self.counts.steps += 1
        start = self.clock()
        decoding = [job for job in self.running if not job.prefilling]
        joining = self._batcher.joining(decoding, self._prompts)
        self._batcher.decode([*decoding, *joining])
        decoded = self.clock()
        self._owed = max(0.0, self._owed - (decoded - start)) if decoding else 0.0
        prompt = self._next_prompt(joining)
        if prompt is not None and self._owed == 0:
            self._batcher.prefill(prompt)
            self._owed = max(0.0, self.clock() - decoded - PATIENCE)
        with self._wake:
            while self._batcher.preempted:
                self.waiting.put_back(self._batcher.preempted.pop(0))
        if not self.running:  # no forward pass follows, which would send
            self._batcher.outbox.send()

    @property
    def _prompts(self) -> list[Job]:
        """Those who have not begun to decode, oldest first."""
        return [job for job in self.running if job.prefilling]

    def _next_prompt(self, joined: list[Job]) -> Job | None:
        """In turn the oldest, and the one that will be done first. If some have `joined` those who
        decode, others that are as short can do so the next time."""
        jobs = [job for job in self._prompts if not (joined and self._batcher.may_join(job))]
        if self.counts.steps % 2:
            return min(jobs, key=lambda job: len(job.to_do), default=None)
        return jobs[0] if jobs else None

    def _drop(self) -> None:
        """End what nobody waits for any more."""
        now = self.clock()

        def ended(job: Job) -> bool:
            late = job.request.deadline is not None and now > job.request.deadline
            return job.cancelled or late

        with self._wake:
            gone = self.waiting.remove_if(ended)
        for job in [*gone, *filter(ended, list(self.running))]:
            job.end("cancelled" if job.cancelled else "timeout")
            self._batcher.leave(job)

    def _admit(self) -> None:
        while len(self.running) < self.max_running:
            with self._wake:
                job = self.waiting.peek()
                if job is None or not has_room(job, self.running, self.prefixes):
                    return
                self.waiting.pop()
                self.running.append(job)
                self.running.sort(key=lambda job: job.serial)
