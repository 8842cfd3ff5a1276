"""Perplexity: exp of the mean negative log-likelihood of a text's tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np

from tiered.engine import Engine
from tiered.quality.interval import METHOD, Interval, interval
from tiered.quality.likelihood import token_log_probs
from tiered.quality.windows import Window, cut

Progress = Callable[[int, int], None]  # windows done, of how many


class Perplexity(NamedTuple):
    """`losses`: negative log-likelihoods of the predicted tokens, float64 [num_predicted], nats."""

    num_tokens: int
    losses: np.ndarray
    size: int
    stride: int
    seconds: float

    @property
    def mean_loss(self) -> float:
        return float(self.losses.mean())

    @property
    def value(self) -> float:
        return perplexity_of(self.mean_loss)

    @property
    def loss_interval(self) -> Interval:
        return interval(self.losses)

    def as_dict(self) -> dict[str, Any]:
        low, high = self.loss_interval
        return {
            "tokens": self.num_tokens,
            "predicted": len(self.losses),
            "window": self.size,
            "stride": self.stride,
            "mean_nll": self.mean_loss,
            "mean_nll_interval": [low, high],
            "perplexity": self.value,
            "perplexity_interval": [perplexity_of(low), perplexity_of(high)],
            "interval": METHOD,
            "seconds": self.seconds,
        }


def perplexity_of(mean_loss: float) -> float:
    """exp, which for a model that is certain of nonsense may be more than a number can be."""
    return math.exp(mean_loss) if mean_loss < 700 else math.inf


def window_sizes(
    num_tokens: int, context: int, size: int | None, stride: int | None
) -> tuple[int, int]:
    """Window and stride in tokens: by default the whole context, and half of it."""
    size = min(size or context, num_tokens)
    return size, min(stride or max(1, size // 2), size)


def measure_perplexity(
    engine: Engine,
    ids: Sequence[int],
    size: int | None = None,
    stride: int | None = None,
    progress: Progress = lambda done, total: None,
) -> Perplexity:
    """The perplexity of `ids`, cut into windows as tiered.quality.windows says."""
    start = perf_counter()
    size, stride = window_sizes(len(ids), engine.context, size, stride)
    windows = cut(len(ids), size, stride)
    losses = []
    for done, window in enumerate(windows):
        progress(done, len(windows))
        losses.append(window_losses(engine, ids, window))
    progress(len(windows), len(windows))
    return Perplexity(len(ids), np.concatenate(losses), size, stride, perf_counter() - start)


def window_losses(engine: Engine, ids: Sequence[int], window: Window) -> np.ndarray:
    """float64 [num_predicted]; memory holds a few rows of logits at a time."""
    begin, end, at = window.begin, window.end, window.first
    losses = []
    for logits in engine.logits_by_rows(ids[begin : end - 1], start=at - 1 - begin):
        losses.append(-token_log_probs(logits, ids[at : at + len(logits)]))
        at += len(logits)
    return np.concatenate(losses)
