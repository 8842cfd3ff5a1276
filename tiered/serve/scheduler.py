"""Continuous batching: requests join and leave between two tokens, and share each fetched expert.

One thread owns the engine. A step computes one token of every running request together, and then a
part of one prompt, so that a long prompt does not hold the others up.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np

from tiered.engine import Engine
from tiered.kv_cache import PAGE_SIZE
from tiered.serve.counts import Counts
from tiered.serve.fair_queue import FairQueue
from tiered.serve.job import Job
from tiered.serve.prefix import PrefixCache
from tiered.serve.request import Event, Request
from tiered.serve.room import has_room, new_pages, sequence_of

log = logging.getLogger("tiered")


class Busy(RuntimeError):
    """The queue is full, or the server is about to end: try again later."""


class Scheduler:
    """Answers requests with one engine. Close it (or use `with`) to end its thread.

    At most `max_running` requests are computed at once, and `max_waiting` wait; while others
    decode, prompts advance by `mixed_chunk` tokens a step. A forward pass decodes at most
    `decode_rows` requests: so many rows give each of them exactly what it would get alone.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        max_running: int = 16,
        max_waiting: int = 256,
        mixed_chunk: int = 128,
        decode_rows: int = 8,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.engine = engine
        self.max_running = max_running
        self.max_waiting = max_waiting
        self.decode_rows = decode_rows
        self.mixed_chunk = min(mixed_chunk, engine.choices.prefill_chunk)
        self.clock = clock
        self.prefixes = PrefixCache(engine.kv)
        self.counts = Counts()
        self.running: list[Job] = []  # oldest first; of the thread, like the prefix cache
        self.waiting: FairQueue[Job] = FairQueue()
        self._arrived = 0
        self._draining = False
        self._closed = False
        self._calls: list[Callable[[], None]] = []
        self._wake = threading.Condition()  # guards waiting, _calls and the flags
        self._thread: threading.Thread | None = None

    # --- for any thread ---

    def submit(self, request: Request, on_event: Callable[[Event], None]) -> Job:
        """Queue a request; `on_event` is called in the scheduler's thread, last with a Finish.

        Raises ValueError for a prompt that cannot be computed, Busy if there is no room to wait.
        """
        self.engine.checked(request.ids)
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
            while (self.waiting or self.running) and self.is_alive:
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
        """One token for each request that decodes, then a part of one prompt."""
        self._drop()
        self._admit()
        self.counts.steps += 1
        decoding = [job for job in self.running if not job.prefilling]
        for start in range(0, len(decoding), self.decode_rows):
            group = decoding[start : start + self.decode_rows]
            self._decode([job for job in group if job.sequence])  # not preempted meanwhile
        self._prefill(self.mixed_chunk if decoding else self.engine.choices.prefill_chunk)

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
            self._leave(job)

    def _admit(self) -> None:
        while len(self.running) < self.max_running:
            with self._wake:
                job = self.waiting.peek()
                if job is None or not has_room(job, self.running, self.prefixes):
                    return
                self.waiting.pop()
                self.running.append(job)
                self.running.sort(key=lambda job: job.serial)

    def _decode(self, jobs: list[Job]) -> None:
        with self._room_for([(job, job.to_do) for job in jobs]) as additions:
            if not additions:
                return
            rows = np.arange(len(additions))
            governor = self.engine.governor
            if governor is not None:
                governor.begin()
            rows_of_logits = self._forward(additions, rows)
            if governor is not None:
                governor.end()
            for (job, _), logits in zip(additions, rows_of_logits, strict=True):
                self._advance(job, logits)
            self.counts.decode_rows += len(additions)
            self.counts.decode_steps += 1

    def _prefill(self, limit: int) -> None:
        """The next part of a prompt: in turn of the oldest, and of the one that is done first."""
        jobs = [job for job in self.running if job.prefilling]
        if not jobs:
            return
        shortest = self.counts.steps % 2
        job = min(jobs, key=lambda job: len(job.to_do)) if shortest else jobs[0]
        self._open(job)
        chunk = job.to_do[:limit]
        with self._room_for([(job, chunk)]) as additions:
            if not additions:
                return
            start = len(job.sequence.tokens)  # type: ignore[union-attr]
            whole = job.request.prompt_logprobs and not job.num_new
            rows = np.arange(len(chunk)) if whole else np.array([len(chunk) - 1])
            logits = self._forward(additions, rows)
            self.counts.prompt_tokens += len(chunk)
            if whole:
                job.score_prompt(logits, start)
            if not job.to_do:
                self.prefixes.insert(job.sequence)  # type: ignore[arg-type]
                job.prompt_done()
                self._advance(job, logits[-1])

    def _open(self, job: Job) -> None:
        """Start from what earlier texts have computed, as late as possible: it may be more."""
        if job.sequence is not None:
            return
        pages: list[int] = []
        if not job.request.prompt_logprobs:
            pages = self.prefixes.match(job.tokens[:-1])
        known = len(pages) * PAGE_SIZE
        job.sequence = self.engine.kv.open(job.tokens[:known], pages)
        if not job.num_new:
            job.num_cached = known
            self.counts.cached_tokens += known

    def _advance(self, job: Job, logits: np.ndarray) -> None:
        before = job.num_new
        try:
            job.advance(logits, self.engine.context, self.clock())
        except Exception as error:  # of this request alone: the others go on
            log.exception("a request failed")
            job.end("error", error)
        self.counts.new_tokens += job.num_new - before
        if job.finish is not None:
            self._leave(job)

    def _forward(self, additions: list[tuple[Job, list[int]]], rows: np.ndarray) -> np.ndarray:
        batch = self.engine.kv.batch([(sequence_of(job), tokens) for job, tokens in additions])
        return self.engine.decoder.forward(batch, self.engine.kv.pages, rows)

    @contextmanager
    def _room_for(
        self, additions: list[tuple[Job, list[int]]]
    ) -> Iterator[list[tuple[Job, list[int]]]]:
        """Make room in the KV cache, perhaps at the youngest's cost; what fails ends with an error.

        Whoever is in the batch of a failed forward pass fails with it: nothing says whose it was.
        """
        additions = self._make_room(additions)
        try:
            yield additions
        except Exception as error:
            log.exception("a forward pass failed")
            for job, _ in additions:
                if job.finish is None:
                    job.end("error", error)
                    self._leave(job, keep=False)

    def _make_room(self, additions: list[tuple[Job, list[int]]]) -> list[tuple[Job, list[int]]]:
        kv = self.engine.kv
        while True:
            needed = sum(new_pages(job, tokens) for job, tokens in additions)
            missing = needed - kv.free_tokens // PAGE_SIZE
            if missing <= 0 or self.prefixes.evict(missing) >= missing:
                return additions
            youngest = max(
                (job for job in self.running if job.sequence), key=lambda job: job.serial
            )
            self._preempt(youngest)
            additions = [(job, tokens) for job, tokens in additions if job is not youngest]

    def _preempt(self, job: Job) -> None:
        """Take a request's pages; it waits in front of all others, and goes on where it was."""
        self.prefixes.insert(sequence_of(job))
        self.engine.kv.close(sequence_of(job))
        job.sequence = None
        job.prefilling = True
        self.running.remove(job)
        with self._wake:
            self.waiting.put_back(job)
        self.counts.preemptions += 1

    def _leave(self, job: Job, keep: bool = True) -> None:
        """A finished request gives its pages back; what they hold is remembered."""
        assert job.finish is not None
        if job.sequence is not None:
            if keep:
                self.prefixes.insert(job.sequence)
            self.engine.kv.close(job.sequence)
            job.sequence = None
        if job in self.running:
            self.running.remove(job)
        self.counts.finished[job.finish.reason] += 1
        now = self.clock()
        self.counts.request_seconds.add(now - job.arrived)
        if job.first_token is not None:
            self.counts.first_token_seconds.add(job.first_token - job.arrived)
