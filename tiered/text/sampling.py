"""Choosing the next token from a model's logits."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

BLOCK = 256  # of weights that are added up before they are chosen from
GROUP = 48  # values, of which the largest is found first
LEAST_TEMPERATURE = 1e-38  # the next smaller ones are none in float32


@dataclass(frozen=True)
class SamplingParams:
    """How to choose; checked once, here.

    Steps go in transformers' order: repetition penalty, temperature, top-k, top-p, min-p.
    """

    temperature: float = 0.0  # 0: always the likeliest token
    top_k: int = 0  # keep the k best (and ties with the last of them); 0: all
    top_p: float = 1.0  # keep the likeliest tokens that make up this much probability
    min_p: float = 0.0  # drop tokens less likely than this times the best one
    repetition_penalty: float = 1.0  # above 1: tokens of prompt and answer become less likely
    seed: int | None = None  # None: another one each time

    def __post_init__(self) -> None:
        _check("temperature", self.temperature, self.temperature >= 0, "0 or more")
        _check("top_k", self.top_k, self.top_k >= 0 and self.top_k == int(self.top_k), "0 or more")
        _check("top_p", self.top_p, 0 < self.top_p <= 1, "above 0 and at most 1")
        _check("min_p", self.min_p, 0 <= self.min_p <= 1, "from 0 to 1")
        penalty = self.repetition_penalty
        _check("repetition_penalty", penalty, penalty > 0, "above 0")
        if self.seed is not None and self.seed < 0:
            raise ValueError(f"seed must be 0 or more, not {self.seed}")


def _check(name: str, value: float, valid: bool, wanted: str) -> None:
    if not valid or not math.isfinite(value):
        raise ValueError(f"{name} must be {wanted}, not {value}")


class Sampler:
    """Chooses the tokens of one text, one after the other."""

    def __init__(self, params: SamplingParams, prompt: Iterable[int] = ()) -> None:
        self.params = params
        self._random = np.random.default_rng(params.seed)
        self._seen: dict[int, None] = dict.fromkeys(prompt) if self._penalizes else {}

    @property
    def _penalizes(self) -> bool:
        return self.params.repetition_penalty != 1.0

    def sample(self, logits: np.ndarray) -> int:
        """The next token after float32 `logits` [vocab_size], which stay as they are.

        Raises ValueError if they are not numbers: weights of a damaged model show here.
        """
        if self._penalizes:
            seen = np.fromiter(self._seen, np.int64, len(self._seen))
            logits = penalize(logits, seen, self.params.repetition_penalty)
        best = int(np.argmax(logits))  # of NaN, if there is one
        if not math.isfinite(logits[best]):
            raise ValueError("the model's output is not a number: its weights are damaged")
        token = best if self.params.temperature == 0 else self._draw(logits)
        if self._penalizes:
            self._seen[token] = None
        return token

    def _draw(self, logits: np.ndarray) -> int:
        tokens, weights = candidates(logits, self.params)
        chosen = pick(weights, self._random.random())
        return chosen if tokens is None else int(tokens[chosen])


def pick(weights: np.ndarray, part: float) -> int:
    """Where the running sum of `weights` (float32 [n], none negative, some positive) passes `part`
    (from 0 to below 1) of the whole: the index of a positive one.

    Running sums are slow: one of blocks comes first, then one of a block's weights.
    """
    num_blocks = len(weights) // BLOCK
    whole = num_blocks * BLOCK
    ends = np.zeros(num_blocks + 1)
    ends[1:] = weights[:whole].reshape(-1, BLOCK).sum(axis=1, dtype=np.float64)
    ends.cumsum(out=ends)
    total = float(ends[-1] + weights[whole:].sum(dtype=np.float64))
    wanted = min(part * total, math.nextafter(total, 0.0))
    block = int(ends[1:].searchsorted(wanted, side="right"))
    start = block * BLOCK
    running = ends[block] + weights[start : start + BLOCK].cumsum(dtype=np.float64)
    wanted = min(wanted, math.nextafter(float(running[-1]), 0.0))
    return start + int(running.searchsorted(wanted, side="right"))


def penalize(logits: np.ndarray, seen: np.ndarray | list[int], penalty: float) -> np.ndarray:
    """A copy with the logits of `seen` tokens made smaller (arXiv 1909.05858)."""
    logits = logits.copy()
    values = logits[seen]
    logits[seen] = np.where(values > 0, values / penalty, values * penalty)
    return logits


def candidates(logits: np.ndarray, params: SamplingParams) -> tuple[np.ndarray | None, np.ndarray]:
    """The tokens that may follow (int64, likeliest first; None: all, in their order) and their
    probabilities (float32), up to a common factor."""
    tokens = None
    if 0 < params.top_k < len(logits):
        tokens = _best(logits, int(params.top_k))
        logits = logits[tokens]
    scaled = logits - logits.max()  # before dividing: tiny temperatures must not overflow
    if params.temperature != 1:
        with np.errstate(over="ignore"):  # to -inf: probability 0
            scaled /= np.float32(max(params.temperature, LEAST_TEMPERATURE))
    weights = np.exp(scaled, out=scaled)
    if params.top_p < 1:
        tokens, weights = _those(_nucleus(weights, params.top_p), tokens, weights)
    if params.min_p > 0:
        kept = np.flatnonzero(weights >= params.min_p * weights.max())
        tokens, weights = _those(kept, tokens, weights)
    return tokens, weights


def _those(
    kept: np.ndarray, tokens: np.ndarray | None, weights: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    return kept if tokens is None else tokens[kept], weights[kept]


def _nucleus(weights: np.ndarray, top_p: float) -> np.ndarray:
    """The smallest set of likeliest tokens that makes up at least `top_p`, likeliest first.

    Few tokens do that in practice, so only as many as needed are sorted.
    """
    wanted = top_p * weights.sum(dtype=np.float64)
    count = min(256, len(weights))
    while True:
        order = _best(weights, count)
        sorted_weights = weights[order].astype(np.float64)
        before = np.cumsum(sorted_weights) - sorted_weights
        num_kept = int(np.count_nonzero(before < wanted))
        if num_kept < len(order) or count == len(weights):
            return order[: max(num_kept, 1)]
        count = min(8 * count, len(weights))


def _best(values: np.ndarray, count: int) -> np.ndarray:
    """Indices of the `count` largest values and of ties with the last, largest first."""
    if count >= len(values):
        kept = np.arange(len(values))
    else:
        kept = np.flatnonzero(values >= _bound(values, count))
        found = values[kept]
        kept = kept[found >= np.partition(found, -count)[-count]]
    order: np.ndarray = kept[_largest_first(values[kept])]
    return order


def _largest_first(values: np.ndarray) -> np.ndarray:
    """Indices of float32 [n] in descending order, equal ones in their own. A value and its index
    are sorted as one whole number: several times as quick as a stable sort of the values."""
    bits = (values + np.float32(0)).view(np.int32)  # makes -0 the same as 0
    ascending = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    keys = (~ascending.astype(np.int64) << 32) | np.arange(len(values))
    keys.sort()
    return keys & 0xFFFFFFFF


def _bound(values: np.ndarray, count: int) -> np.float32:
    """What at least `count` values reach, and not many more: of the largest in each of several
    times as many groups, the `count`-th. To find it is quicker than to order all values."""
    size = min(len(values) // count, GROUP)
    largest = values[: len(values) // size * size].reshape(size, -1).max(axis=0)
    return np.partition(largest, -count)[-count]  # type: ignore[no-any-return]


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Log-probabilities along the last axis: float64, the shape of `logits`."""
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(axis=-1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return shifted
