"""Speculation: what a text is likely to go on with is computed along with its last token.

A draft costs nothing to make, but its tokens want experts of their own, so that a step takes
longer; the tokens that turn out right come out of the same step. Output never changes: each token
is sampled as it would have been, and a draft only counts as far as it says the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from tiered import kv_cache
from tiered.draft_layer import DraftLayer
from tiered.governor import Governor

MOST = 7  # tokens of a draft; with the last one, no more rows than give each the bits it has alone
FEWEST = 2  # where the last draft was wrong


class Drafter(Protocol):
    """Makes the drafts of one text."""

    def push(self, token: int) -> None:
        """The text goes on."""

    def draft(self, most: int) -> list[int]:
        """Up to `most` tokens, perhaps none."""

    def judge(self, drafted: int, accepted: int) -> None:
        """How many tokens of the last draft were right."""


class PromptLookup:
    """Drafts what followed the last tokens where they stood before; more of it while that is right.

    https://github.com/apoorvumang/prompt-lookup-decoding
    """

    sizes = (3, 2)  # tokens that must be the same; more is better

    def __init__(self, tokens: Sequence[int]) -> None:
        self._tokens: list[int] = []
        self._after: dict[tuple[int, ...], int] = {}  # where the text went on, last
        self._limit = FEWEST
        for token in tokens:
            self.push(token)

    def push(self, token: int) -> None:
        """The text goes on."""
        for size in self.sizes:
            if len(self._tokens) >= size:
                self._after[tuple(self._tokens[-size:])] = len(self._tokens)
        self._tokens.append(token)

    def draft(self, most: int) -> list[int]:
        """Up to `most` tokens, perhaps none."""
        for size in self.sizes:
            start = self._after.get(tuple(self._tokens[-size:]))
            if start is not None and len(self._tokens) >= size:
                return self._tokens[start : start + min(self._limit, most)]
        return []

    def judge(self, drafted: int, accepted: int) -> None:
        """How many tokens of the last draft were right."""
        if drafted:
            self._limit = min(2 * self._limit, MOST) if accepted == drafted else FEWEST


class MultiTokenPrediction:
    """Drafts what a layer of the model's own foresees: one token more than was right last."""

    def __init__(self, layer: DraftLayer, sequence: kv_cache.Sequence) -> None:
        self._layer = layer
        self._sequence = sequence
        self._tokens = list(sequence.tokens)
        self._limit = 1

    def push(self, token: int) -> None:
        self._tokens.append(token)

    def draft(self, most: int) -> list[int]:
        return self._layer.draft(self._sequence, self._tokens, min(self._limit, most))

    def judge(self, drafted: int, accepted: int) -> None:
        if drafted:
            self._limit = min(accepted + 1, MOST)


def seconds_per_token(seconds: Sequence[float], counts: Sequence[int]) -> float:
    """Steps make different numbers of tokens: on average."""
    return sum(seconds) / sum(counts)


def speculation_governor() -> Governor:
    """Turns drafts off while a wider step costs more than its tokens save."""
    return Governor((0, MOST), "speculation", typical=seconds_per_token)
