"""A side of a comparison: a model at work, or what it once said, in a file."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

from tiered.engine import Engine
from tiered.quality.rows import Rows, text_rows
from tiered.quality.tasks import Answer, Task, answer_task
from tiered.quality.windows import cut


class TextPlan(NamedTuple):
    """What both sides are asked."""

    ids: tuple[int, ...]
    size: int  # of a window, tokens
    stride: int
    num_prompt: int  # first tokens of the text, which a generation continues
    num_generated: int
    tasks: tuple[Task, ...] = ()

    @property
    def num_predicted(self) -> int:
        return sum(w.num_predicted for w in cut(len(self.ids), self.size, self.stride))


class SideFacts(NamedTuple):
    """What two sides must have in common to be compared; routing only if the last two are equal."""

    name: str
    settings: dict[str, Any]
    vocab_size: int
    vocabulary: str  # a digest of what its tokens spell
    num_experts: int
    sparse_layers: tuple[int, ...]


class Side(Protocol):
    facts: SideFacts

    def rows(self, plan: TextPlan) -> Iterator[Rows]:
        """For every predicted token of the text, in order."""

    def generate(self, plan: TextPlan) -> list[int]:
        """The greedy continuation of the text's first tokens."""

    def answers(self, plan: TextPlan) -> list[Answer]: ...


class LiveSide:
    """A model at work."""

    def __init__(self, engine: Engine, name: str, settings: dict[str, Any]) -> None:
        self.engine = engine
        config = engine.config
        self.facts = SideFacts(
            name,
            settings,
            config.vocab_size,
            vocabulary_digest(engine),
            config.num_experts,
            tuple(config.sparse_layers),
        )

    def rows(self, plan: TextPlan) -> Iterator[Rows]:
        return text_rows(self.engine, plan.ids, cut(len(plan.ids), plan.size, plan.stride))

    def generate(self, plan: TextPlan) -> list[int]:
        if not plan.num_generated:
            return []
        prompt = plan.ids[: plan.num_prompt]
        return list(self.engine.generate_tokens(prompt, plan.num_generated))

    def answers(self, plan: TextPlan) -> list[Answer]:
        return [answer_task(self.engine, task) for task in plan.tasks]


def vocabulary_digest(engine: Engine) -> str:
    """What all tokens spell; control tokens are left out, because variants of one model rename
    them."""
    digest, tokenizer = hashlib.sha256(), engine.tokenizer
    special = tokenizer.special_ids
    for token in range(engine.config.vocab_size):
        text = b"" if token in special else tokenizer.token_bytes(token)
        digest.update(len(text).to_bytes(4, "little") + text)
    return digest.hexdigest()


def check_same_tokens(a: SideFacts, b: SideFacts) -> None:
    """ValueError if a token's number does not mean the same to both."""
    if a.vocab_size != b.vocab_size:
        raise ValueError(
            f"{a.name} has {a.vocab_size} tokens and {b.name} has {b.vocab_size}: their "
            "distributions cannot be compared; give two models with one tokenizer"
        )
    if a.vocabulary != b.vocabulary:
        raise ValueError(
            f"the tokenizers of {a.name} and {b.name} differ: their distributions cannot be "
            "compared; give two models with one tokenizer"
        )


def tasks_digest(tasks: Sequence[Task]) -> str:
    return hashlib.sha256(repr(list(tasks)).encode()).hexdigest()
