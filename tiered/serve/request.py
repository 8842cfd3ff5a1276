"""What a client asks for, and the events that answer it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np

from tiered.text.sampling import SamplingParams


class Constraint(Protocol):
    """A language that the answer must belong to; see tiered.serve.structured."""

    @property
    def finished(self) -> bool:
        """Whether nothing can follow."""

    def mask(self, logits: np.ndarray) -> None:
        """Rule out, with -inf, the tokens that cannot come next: float32 [vocab_size], in place."""

    def accept(self, token: int) -> None:
        """`token` was chosen."""


@dataclass(frozen=True)
class Request:
    """Continue `ids` by at most `max_new_tokens`, and stop before a stop token or a stop string.

    `logprobs`: for each token its log-probability and those of this many likeliest alternatives;
    `prompt_logprobs`: for those of the prompt too. `pooling`: nothing is to follow, and the prompt
    becomes one vector: of its tokens' hidden states the "mean" or the "last". `skip_ids` are tokens
    without text. `client` is for whose account it is: clients take turns. `deadline` is a time of
    the scheduler's clock.
    """

    ids: tuple[int, ...]
    max_new_tokens: int
    sampling: SamplingParams = field(default_factory=SamplingParams)
    stop: tuple[str, ...] = ()
    stop_ids: frozenset[int] = frozenset()
    skip_ids: frozenset[int] = frozenset()
    logprobs: int | None = None
    prompt_logprobs: bool = False
    pooling: str = ""
    logit_bias: tuple[tuple[int, float], ...] = ()
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    constraint: Constraint | None = None
    client: str = ""
    deadline: float | None = None


class Choice(NamedTuple):
    """A token, its log-probability, and the likeliest tokens in its place, best first."""

    token: int
    logprob: float
    alternatives: tuple[tuple[int, float], ...]


class PromptScores(NamedTuple):
    """Log-probabilities of the prompt's tokens; the first has none."""

    choices: list[Choice]


class Embedding(NamedTuple):
    """The prompt as one vector, float32 [hidden_size], of length 1."""

    vector: np.ndarray


class Piece(NamedTuple):
    """One more token. `text` is what is certain by now: it may be empty, or of earlier tokens."""

    text: str
    token: int
    choice: Choice | None = None


class Finish(NamedTuple):
    """The last event. `reason` is stop, length, cancelled, timeout or error."""

    reason: str
    text: str  # what was held back until now
    num_prompt: int
    num_cached: int  # tokens of the prompt that had been computed before
    num_new: int
    stop: str | None = None  # the stop string that ended it
    error: BaseException | None = None
    choice: Choice | None = None  # the end token, which is no part of the answer, if it came


Event = PromptScores | Embedding | Piece | Finish
