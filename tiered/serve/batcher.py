"""The forward passes of many requests, and the KV cache's pages that they take turns with."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np

from tiered.kv_cache import PAGE_SIZE
from tiered.serve.counts import Counts
from tiered.serve.job import Job
from tiered.serve.outbox import Outbox
from tiered.serve.prefix import PrefixCache
from tiered.serve.room import new_pages, sequence_of
from tiered.speculation import speculation_governor

if TYPE_CHECKING:
    from tiered.engine import Engine

log = logging.getLogger("tiered")
Additions = list[tuple[Job, list[int]]]  # tokens to append, by request


class Batcher:
    """Owns an engine: belongs to one thread. `running` are the requests that hold pages or may.

    What a request gets does not depend on the others: products of few rows give each row the
    bits that it would have alone, so no more than `decode_rows` are decoded at once, prompts that
    are as short among them. A longer one is computed alone, in the chunks that
    `Engine.generate_tokens` would choose. Starting from another text's pages moves the chunks, as
    it does in the engine, and so may change last bits.

    Rows that requests leave free are for drafts of what they will say. Whether these pay depends on
    how many requests share a step, so that there is a governor for each number.
    """

    def __init__(self, engine: Engine, decode_rows: int, clock: Callable[[], float]) -> None:
        self.engine = engine
        self.decode_rows = decode_rows
        self.clock = clock
        self.counts = Counts()
        self.outbox = Outbox()
        self.prefixes = PrefixCache(engine.kv)
        self.running: list[Job] = []  # oldest first
        self.preempted: list[Job] = []  # they left `running`, and have to wait again
        self.speculation = [speculation_governor() for _ in range(decode_rows + 1)]

    def decode(self, jobs: list[Job]) -> None:
        """One token for each, or more where drafts turn out right. Those who have not begun yet
        have short prompts, which are computed along (see `joining`)."""
        for job in jobs:
            self._open(job)
        for group in self._groups(jobs):
            with self._room_for([(job, job.to_do) for job in group if job.sequence]) as additions:
                if additions:
                    self._decode([job for job, _ in additions])

    def joining(self, decoding: list[Job], prefilling: list[Job]) -> list[Job]:
        """Whose prompts fit into the rows that those who decode leave free, oldest first."""
        free = self.decode_rows - sum(len(job.to_do) for job in decoding)
        joining = []
        for job in filter(self.may_join, prefilling):
            if len(job.to_do) <= free:
                joining.append(job)
                free -= len(job.to_do)
        return joining

    def may_join(self, job: Job) -> bool:
        """Whether a prompt can be computed together with tokens of others."""
        whole = job.request.prompt_logprobs or job.request.pooling  # more than what follows it
        return len(job.to_do) <= self.decode_rows and not whole

    def _groups(self, jobs: list[Job]) -> Iterator[list[Job]]:
        """As many at once as have `decode_rows` tokens to compute."""
        group: list[Job] = []
        num_rows = 0
        for job in jobs:
            own = len(job.to_do)
            if num_rows + own > self.decode_rows:
                yield group
                group, num_rows = [], 0
            group.append(job)
            num_rows += own
        if group:
            yield group

    def _decode(self, jobs: list[Job]) -> None:
        start, before = perf_counter(), self.counts.new_tokens
        governors, kv, most = self.engine.governors, self.engine.kv, self._most_drafted(jobs)
        for job in jobs:
            job.make_draft(min(most, job.most_new(self.engine.context) - 1))
        additions = [(job, [*job.to_do, *job.draft]) for job in jobs]
        rows: list[int] = []  # whose logits are wanted: of drafts, and of the token before
        end = 0
        for job, tokens in additions:
            end += len(tokens)
            rows += range(end - 1 - len(job.draft), end)
            if job.draft:
                kv.set_mark(sequence_of(job))
        governors.begin()
        logits = self._forward(additions, np.array(rows))
        if end == len(jobs):  # neither drafts nor prompts: they compare steps that are alike
            governors.end()
        self.counts.decode_rows += end
        self.counts.decode_steps += 1
        first, prompts = 0, [(job, tokens) for job, tokens in additions if job.prefilling]
        for job, tokens in prompts:
            self._prompt_done(job, tokens)
        for job in jobs:
            last = first + 1 + len(job.draft)
            self._check(job, logits[first:last])
            first = last
        self.prefixes.make_way()
        if self.engine.generation.speculates and not prompts:
            made = self.counts.new_tokens - before
            self.speculation[len(jobs)].add(perf_counter() - start, max(made, 1))

    def _most_drafted(self, jobs: list[Job]) -> int:
        """Tokens of a draft for each: its share of the rows that are free, if there is memory to
        spare."""
        engine = self.engine
        if not engine.generation.speculates or engine.kv.free_tokens < len(jobs) * PAGE_SIZE:
            return 0
        free = self.decode_rows - sum(len(job.to_do) for job in jobs)
        return min(self.speculation[len(jobs)].limit(), free // len(jobs))

    def _check(self, job: Job, logits: np.ndarray) -> None:
        """Choose tokens as long as they are the drafted ones, and take back what is wrong."""
        draft, right = job.draft, 0
        for row, drafted in zip(logits, [*draft, None], strict=True):
            chosen = self._choose(job, row)
            if chosen is None or chosen != drafted:
                break
            right += 1
            if job.finish is not None:
                break
        job.judge_draft(right)
        self.counts.drafted += len(draft)
        self.counts.drafted_right += right
        if right < len(draft):
            sequence = sequence_of(job)
            self.engine.kv.take_back(sequence, len(sequence.tokens) - len(draft) + right)
        if job.finish is not None:
            self.leave(job)

    def prefill(self, job: Job) -> None:
        """The next chunk of a prompt, and the first token if it was the last."""
        self._open(job)
        scored = job.request.prompt_logprobs and not job.num_new
        pooled = job.request.pooling
        wants_all = scored or pooled == "mean"
        chunk = self.engine.choices.prefill_chunk
        tokens = job.next_chunk(chunk if wants_all else self._at_once, self.decode_rows)
        with self._room_for([(job, tokens)]) as additions:
            if not additions:
                return
            sequence = sequence_of(job)
            start = len(sequence.tokens)
            rows = np.arange(len(tokens)) if wants_all else np.array([len(tokens) - 1])
            output = self.engine.hidden_output if pooled else None
            logits = self._forward(additions, rows, output, chunk)
            if scored:
                job.score_prompt(logits, start)
            if pooled:
                job.pool(logits, start)
            self._prompt_done(job, tokens)
            if not job.prefilling:
                self._choose(job, logits[-1])
                if job.finish is not None:
                    self.leave(job)

    def _prompt_done(self, job: Job, tokens: list[int]) -> None:
        """So many more tokens of a prompt have been computed, perhaps all that there were."""
        self.counts.prompt_tokens += len(tokens)
        if job.to_do:
            return
        sequence = sequence_of(job)
        if (watcher := self.engine.generation.watcher) is not None:
            watcher.catch_up(sequence)  # others may begin with pages of this text
        self.prefixes.insert(sequence)
        job.prompt_done(self.engine.generation.drafter(sequence))

    @property
    def _at_once(self) -> int:
        """Tokens of a prompt to compute at once. More than a chunk where that saves bringing the
        same experts again, and nobody waits for the next token meanwhile."""
        engine = self.engine
        at_hand = engine.plan.mapped and not engine.shares
        if at_hand or len(self.running) > 1:
            return engine.choices.prefill_chunk
        return engine.generation.pass_tokens

    def _open(self, job: Job) -> None:
        """Start from what earlier texts have computed, as late as possible: it may be more."""
        if job.sequence is not None:
            return
        pages: list[int] = []
        if not job.request.prompt_logprobs and job.request.pooling != "mean":
            pages = self.prefixes.match(job.tokens[:-1])
        known = len(pages) * PAGE_SIZE
        if job.start is None:
            job.start = known
            self.counts.cached_tokens += known
        elif job.start < known < len(job.request.ids):  # preempted: the same chunks as before
            known -= (known - job.start) % self.engine.choices.prefill_chunk
            known -= known % PAGE_SIZE
        job.sequence = self.engine.kv.open(job.tokens[:known], pages[: known // PAGE_SIZE])

    def _choose(self, job: Job, logits: np.ndarray) -> int | None:
        """The next token, if there is one more."""
        before = job.num_new
        try:
            job.advance(logits, self.engine.context, self.clock())
        except Exception as error:  # of this request alone: the others go on
            log.exception("a request failed")
            job.end("error", error)
        self.counts.new_tokens += job.num_new - before
        return job.tokens[-1] if job.num_new > before else None

    def _forward(
        self, additions: Additions, rows: np.ndarray, output: Any = None, chunk: int = 0
    ) -> np.ndarray:
        kv, decoder = self.engine.kv, self.engine.decoder
        batch = kv.batch([(sequence_of(job), tokens) for job, tokens in additions])
        self.outbox.send()
        x = decoder.hidden(batch, kv.pages, chunk)
        logits = decoder.head(x, rows, output)
        if (watcher := self.engine.generation.watcher) is not None:
            first = 0
            for job, tokens in additions:
                sequence, end = sequence_of(job), first + len(tokens)
                start = len(sequence.tokens) - len(tokens)
                watcher.watch(sequence, start, x[first:end])
                first = end
        return logits

    @contextmanager
    def _room_for(self, additions: Additions) -> Iterator[Additions]:
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
                    self.leave(job, keep=False)

    def _make_room(self, additions: Additions) -> Additions:
        kv = self.engine.kv
        while True:
            needed = sum(new_pages(job, tokens) for job, tokens in additions)
            missing = needed - kv.free_tokens // PAGE_SIZE
            if missing <= 0 or self.prefixes.evict(missing) >= missing:
                return additions
            holders = [job for job in self.running if job.sequence]
            youngest = max(holders, key=lambda job: job.serial)
            self._preempt(youngest)
            additions = [(job, tokens) for job, tokens in additions if job is not youngest]

    def _preempt(self, job: Job) -> None:
        """Take a request's pages; when there is room again it goes on where it was."""
        self.prefixes.insert(sequence_of(job))
        self.engine.kv.close(sequence_of(job))
        job.sequence = None
        job.prefilling = True
        self.running.remove(job)
        self.preempted.append(job)
        self.counts.preemptions += 1

    def leave(self, job: Job, keep: bool = True) -> None:
        """A finished request gives its pages back; with `keep`, what they hold is remembered."""
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
