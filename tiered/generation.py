"""Generation: the loop that a text goes through, forward, sample, yield, and what it says in words.

It knows nothing of files and budgets; the engine makes what is computed with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from time import perf_counter
from typing import Any

import numpy as np

from tiered import kv_cache
from tiered.config import EngineConfig
from tiered.draft_layer import DraftLayer
from tiered.governor import Governors
from tiered.kv_cache import KVCache
from tiered.model import Decoder
from tiered.speculation import (
    MOST,
    Drafter,
    MultiTokenPrediction,
    PromptLookup,
    speculation_governor,
)
from tiered.stats import EngineStats
from tiered.text.sampling import Sampler, log_softmax
from tiered.text.stop_strings import StopStrings
from tiered.text.tokenizer import TextStream

LOGITS_ROWS = 64  # tokens whose logits are held at once


class Generation:
    """Computes texts with one decoder, one at a time. `counted` are its tokens and seconds.

    A prompt is computed in chunks (`choices.prefill_chunk`), up to `pass_tokens` of them in a pass.
    `damage` makes the error for logits that are not numbers. `clock` is a simulated machine's, if
    it computes on one.
    """

    def __init__(
        self,
        decoder: Decoder,
        kv: KVCache,
        governors: Governors,
        choices: EngineConfig,
        pass_tokens: int,
        damage: Callable[[], Exception],
        clock: Callable[[], float] = perf_counter,
    ) -> None:
        self.decoder = decoder
        self.kv = kv
        self.governors = governors
        self.choices = choices
        self.pass_tokens = pass_tokens
        self.draft_layer: DraftLayer | None = None
        self.speculation = speculation_governor()
        self.counted = EngineStats()
        self._clock = clock
        self._damage = damage

    def begin(self, sequence: kv_cache.Sequence, ids: Sequence[int]) -> np.ndarray:
        """Compute a prompt, but for what `sequence` has in common with it: the logits after it,
        float32 [vocab_size]."""
        shared = self.kv.truncate(sequence, common_prefix(sequence.tokens, ids[:-1]))
        with self._timed("prefill"):
            for part in _parts(ids[shared:], self.pass_tokens):
                rows, chunk = np.array([len(part) - 1]), self.choices.prefill_chunk
                last: np.ndarray = self._forward(sequence, part, rows, chunk)[0]
        self.counted.prompt_tokens += len(ids) - shared
        return last

    def tokens(
        self, sequence: kv_cache.Sequence, logits: np.ndarray, sampler: Sampler, most: int
    ) -> Iterator[int]:
        """Sample `most` tokens, the first of them from `logits`."""
        drafter = self.drafter(sequence)
        rows, seconds = logits[None], 0.0
        again: list[int] = []  # tokens that were said, and have to be computed once more
        draft: list[int] = []
        while most:
            right = 0
            try:
                for row, drafted in zip(rows, [*draft, None], strict=True):
                    token = sampler.sample(row)
                    most -= 1
                    right += token == drafted
                    yield token
                    if token != drafted or not most:
                        break
            finally:  # whoever stops listening leaves no drafts behind
                again = self._keep(sequence, right, len(draft))
            self.counted.drafted += len(draft)
            self.counted.drafted_right += right
            if not most:
                return
            start = self._clock()
            with self._timed("decode"):
                if drafter is not None:
                    if seconds:
                        self.speculation.add(seconds, 1 + right)
                    drafter.judge(len(draft), right)
                    for known in [*draft[:right], token]:
                        drafter.push(known)
                    room = min(MOST - len(again), most - 1)
                    draft = drafter.draft(min(self.speculation.limit(), room))
                if draft:
                    self.kv.set_mark(sequence)
                rows = self._decode(sequence, [*again, token, *draft])[len(again) :]
            seconds = self._clock() - start

    def _keep(self, sequence: kv_cache.Sequence, right: int, drafted: int) -> list[int]:
        """Take back what was drafted wrongly; returns what has to be computed again."""
        wrong = drafted - right
        return self.kv.take_back(sequence, len(sequence.tokens) - wrong) if wrong else []

    @property
    def decoders(self) -> list[Decoder]:
        """All that fetch experts."""
        return [self.decoder, *([self.draft_layer.decoder] if self.draft_layer else [])]

    @property
    def speculates(self) -> bool:
        """A trace, recorded or replayed, has each token once and in order."""
        on = self.choices.speculate != "off" and self.choices.routing is None
        return on and self.decoder.trace is None

    def drafter(self, sequence: kv_cache.Sequence) -> Drafter | None:
        """What drafts a text, all of whose tokens so far are computed; None if nothing is to."""
        if not self.speculates:
            return None
        if self.draft_layer is not None:
            return MultiTokenPrediction(self.draft_layer, sequence)
        return PromptLookup(sequence.tokens)

    @property
    def watcher(self) -> DraftLayer | None:
        """The draft layer, if it is to know what is computed."""
        return self.draft_layer if self.speculates else None

    def score(self, prompt: Sequence[int], answer: Sequence[int]) -> np.ndarray:
        """The log-probability of each token of an answer, decoded one by one as if it had been
        sampled: float32 [len(answer)]."""
        sequence, result = self.kv.open(), np.empty(len(answer), np.float32)
        try:
            logits = self.begin(sequence, prompt)
            self.counted.new_tokens += 1
            for index, token in enumerate(answer):
                result[index] = log_softmax(logits)[token]
                with self._timed("decode"):
                    logits = self._decode(sequence, [token])[0]
                self.counted.new_tokens += 1
            return result
        finally:
            self.kv.close(sequence)

    def outputs(
        self, ids: Sequence[int], start: int = 0, output: Any = None
    ) -> Iterator[np.ndarray]:
        """What `output`, or the model's own output layer, makes of each token from `start` on."""
        sequence = self.kv.open()
        try:
            for chunk in _parts(ids, self.choices.prefill_chunk):
                first = max(0, start - len(sequence.tokens))
                batch = self.kv.batch([(sequence, chunk)])
                x = self.decoder.hidden(batch, self.kv.pages)
                for row in range(first, len(chunk), LOGITS_ROWS):
                    rows = np.arange(row, min(row + LOGITS_ROWS, len(chunk)))
                    yield self._finite(self.decoder.head(x, rows, output))
        finally:
            self.kv.close(sequence)

    def _decode(self, sequence: kv_cache.Sequence, tokens: Sequence[int]) -> np.ndarray:
        """Logits after each of a few tokens, float32 [len(tokens), vocab_size]."""
        begin, other = perf_counter(), self._seconds_elsewhere
        self.governors.begin()
        logits = self._forward(sequence, tokens, np.arange(len(tokens)))
        if len(tokens) == 1:  # they compare steps that are alike
            self.governors.end()
        elsewhere = self._seconds_elsewhere - other
        self.counted.decode_python += perf_counter() - begin - elsewhere
        return logits

    @property
    def _seconds_elsewhere(self) -> float:
        """Spent in arithmetic and waiting for experts, so far."""
        return self.decoder.backend.seconds + self.decoder.clock.seconds["waiting"]

    def _forward(
        self, sequence: kv_cache.Sequence, ids: Sequence[int], rows: np.ndarray, chunk: int = 0
    ) -> np.ndarray:
        """Append tokens and compute them, in chunks if there are more than `chunk`: logits after
        those at `rows`, float32 [len(rows), vocab_size]. On an error the sequence is as it was
        before (empty, for a recurrent model)."""
        length = len(sequence.tokens)
        try:
            batch = self.kv.batch([(sequence, ids)])
            x = self.decoder.hidden(batch, self.kv.pages, chunk)
            logits = self._finite(self.decoder.head(x, rows))
            if (watcher := self.watcher) is not None:
                watcher.watch(sequence, length, x)
            return logits
        except BaseException:
            self.kv.truncate(sequence, length)
            raise

    @contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        """What is done within is counted as seconds of "prefill" or "decode"."""
        start, simulated = perf_counter(), self._clock()
        yield
        counted, name = self.counted, f"{phase}_seconds"
        setattr(counted, name, getattr(counted, name) + perf_counter() - start)
        if self._clock is not perf_counter:
            name = f"simulated_{name}"
            setattr(counted, name, getattr(counted, name) + self._clock() - simulated)

    def _finite(self, logits: np.ndarray) -> np.ndarray:
        if not np.isfinite(logits.max()):
            raise self._damage()
        return logits


def _parts(ids: Sequence[int], size: int) -> list[Sequence[int]]:
    return [ids[start : start + size] for start in range(0, len(ids), size)]


def texts(tokens: Iterator[int], stream: TextStream, stop: Sequence[str]) -> Iterator[str]:
    """Tokens as pieces of text, which end before one of `stop`."""
    stops = StopStrings(stop)
    for token in tokens:
        if piece := stops.push(stream.push(token)):
            yield piece
        if stops.stopped:
            return
    if piece := stops.push(stream.finish()) + stops.finish():
        yield piece


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two texts share from their start."""
    for index, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return index
    return min(len(a), len(b))
