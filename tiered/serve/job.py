"""A request that is being answered: its text so far, and what its next token will be."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import numpy as np

from tiered.kv_cache import Sequence
from tiered.serve.request import Choice, Embedding, Event, Finish, Piece, PromptScores, Request
from tiered.speculation import Drafter
from tiered.text.sampling import Sampler
from tiered.text.stop_strings import StopStrings
from tiered.text.tokenizer import TextStream, Tokenizer


class Job:
    """Belongs to the scheduler's thread, except for `cancel`.

    `tokens` are the prompt and all that was sampled; those of `sequence` have been computed, and
    the rest is to do: a part of the prompt, or the last sampled token.
    """

    def __init__(
        self,
        request: Request,
        tokenizer: Tokenizer,
        on_event: Callable[[Event], None],
        serial: int,
        arrived: float,
    ) -> None:
        self.request = request
        self.serial = serial  # in order of arrival
        self.arrived = arrived
        self.first_token: float | None = None  # when it came
        self.tokens = list(request.ids)
        self.sequence: Sequence | None = None
        self.prefilling = True
        self.start: int | None = None  # the tokens before had been computed by others
        self.finish: Finish | None = None
        self.cancelled = False
        self.draft: list[int] = []  # what may follow, and is computed along
        self._drafter: Drafter | None = None
        self._on_event = on_event
        self._sampler = Sampler(request.sampling, request.ids)
        self._stream = TextStream(tokenizer.token_bytes, request.skip_ids)
        self._stops = StopStrings(request.stop)
        self._counts: Counter[int] = Counter()
        self._scores: list[Choice] = []
        self._pooled: np.ndarray = np.zeros(1)

    def cancel(self) -> None:
        """The client went away; takes effect between two tokens."""
        self.cancelled = True

    @property
    def num_new(self) -> int:
        return len(self.tokens) - len(self.request.ids)

    @property
    def to_do(self) -> list[int]:
        """Tokens that are known and not computed."""
        return self.tokens[len(self.sequence.tokens) :] if self.sequence else self.tokens

    def next_chunk(self, most: int, decode_rows: int) -> list[int]:
        """Up to `most` tokens of the prompt to compute next; what was decoded before a preemption
        again as it was then."""
        assert self.sequence is not None
        done, prompt = len(self.sequence.tokens), len(self.request.ids)
        if done >= prompt:
            return self.tokens[done : done + decode_rows]
        return self.tokens[done : min(done + most, prompt)]

    def score_prompt(self, logits: np.ndarray, start: int) -> None:
        """Logits after the prompt's tokens from `start` on: float32 [count, vocab_size]."""
        if start == 0:  # perhaps again, after a preemption
            self._scores = []
        following = self.request.ids[start + 1 : start + 1 + len(logits)]
        num_best = self.request.logprobs or 0
        self._scores += [score(row, t, num_best) for row, t in zip(logits, following, strict=False)]

    def pool(self, states: np.ndarray, start: int) -> None:
        """Hidden states of the prompt's tokens from `start` on: float32 [count, hidden_size]."""
        if self.request.pooling == "last":
            self._pooled = states[-1].astype(np.float64)
        else:
            before = self._pooled if start else 0.0
            self._pooled = before + states.sum(axis=0, dtype=np.float64)

    def most_new(self, context: int) -> int:
        """How many tokens may still come."""
        return min(self.request.max_new_tokens - self.num_new, context + 1 - len(self.tokens))

    def make_draft(self, most: int) -> None:
        """Guess what follows, at most so many tokens."""
        self.draft = self._drafter.draft(most) if self._drafter and most > 0 else []

    def judge_draft(self, right: int) -> None:
        """How many tokens of the draft came."""
        if self._drafter is not None:
            self._drafter.judge(len(self.draft), right)
        self.draft = []

    def prompt_done(self, drafter: Drafter | None = None) -> None:
        """The whole prompt has been computed; `drafter` may guess what follows."""
        self.prefilling = False
        self._drafter = drafter
        if self.request.prompt_logprobs and not self.num_new:
            self._on_event(PromptScores(self._scores))
            self._scores = []
        if self.request.pooling:
            length = max(float(np.linalg.norm(self._pooled)), 1e-30)
            self._on_event(Embedding((self._pooled / length).astype(np.float32)))

    def advance(self, logits: np.ndarray, context: int, now: float) -> None:
        """Choose the next token from float32 [vocab_size], which it overwrites."""
        request = self.request
        if request.max_new_tokens == 0:
            self.end("length")
            return
        raw = logits.copy() if request.logprobs is not None else None
        self._adjust(logits)
        token = int(self._sampler.sample(logits))
        if self.first_token is None:
            self.first_token = now
        if request.constraint is not None:
            request.constraint.accept(token)
        choice = None if raw is None else score(raw, token, request.logprobs or 0)
        if token in request.stop_ids:
            self.end("stop", choice=choice)
            return
        self.tokens.append(token)
        if self._drafter is not None:
            self._drafter.push(token)
        self._counts[token] += 1
        text = self._stops.push(self._stream.push(token))
        self._on_event(Piece(text, token, choice))
        constraint = request.constraint
        if self._stops.stopped or (constraint is not None and constraint.finished):
            self.end("stop")
        elif self.num_new >= request.max_new_tokens or len(self.tokens) > context:
            self.end("length")

    def end(
        self, reason: str, error: BaseException | None = None, choice: Choice | None = None
    ) -> None:
        """Send the last event."""
        text = ""
        if not self._stops.stopped and reason in ("stop", "length"):
            text = self._stops.push(self._stream.finish()) + self._stops.finish()
        self.finish = Finish(
            reason,
            text,
            len(self.request.ids),
            self.start or 0,
            self.num_new,
            self._stops.matched,
            error,
            choice,
        )
        self._on_event(self.finish)

    def _adjust(self, logits: np.ndarray) -> None:
        request = self.request
        if request.presence_penalty or request.frequency_penalty:
            for token, count in self._counts.items():
                logits[token] -= request.presence_penalty + request.frequency_penalty * count
        for token, bias in request.logit_bias:
            logits[token] += bias
        if request.constraint is not None:
            request.constraint.mask(logits)


def score(logits: np.ndarray, token: int, num_best: int) -> Choice:
    """Log-probability of `token` under float32 [vocab_size], and the `num_best` likeliest."""
    peak = float(logits.max())
    total = peak + float(np.log(np.exp(logits - peak).sum(dtype=np.float64)))
    best: np.ndarray = np.empty(0, np.int64)
    if num_best:
        best = np.argpartition(-logits, min(num_best, len(logits)) - 1)[:num_best]
        best = best[np.argsort(-logits[best], kind="stable")]
    alternatives = tuple((int(i), float(logits[i]) - total) for i in best)
    return Choice(token, float(logits[token]) - total, alternatives)
