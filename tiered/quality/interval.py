"""Confidence intervals of a mean, from the values of neighbouring tokens."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

BLOCK = 64  # tokens; what one says of a text depends on its neighbours, so they are drawn together
FEWEST_BLOCKS = 32
NUM_RESAMPLES = 1000
LEVEL = 0.95
METHOD = f"{LEVEL:.0%}, circular block bootstrap of the mean, blocks of {BLOCK} tokens"


class Interval(NamedTuple):
    low: float
    high: float


def interval(values: np.ndarray, block: int = BLOCK, seed: int = 0) -> Interval:
    """Where the mean of `values` [n] lies with a confidence of 95 %.

    A circular block bootstrap (Politis and Romano, 1992): means of resamples made of whole blocks
    of neighbours, which may wrap around. Blocks of few values are shorter: a handful of blocks
    would say little about how much they differ.
    """
    values = np.asarray(values, np.float64)
    size = max(1, min(block, len(values) // FEWEST_BLOCKS))
    wrapped = np.concatenate([values, values[: size - 1]])
    sums = np.concatenate([[0.0], np.cumsum(wrapped)])
    means = (sums[size:] - sums[:-size]) / size  # [n]: of the block that begins at each value
    random, count = np.random.default_rng(seed), -(-len(values) // size)
    drawn = [means[random.integers(len(means), size=count)].mean() for _ in range(NUM_RESAMPLES)]
    tail = 50 * (1 - LEVEL)
    low, high = np.percentile(drawn, [tail, 100 - tail])
    return Interval(float(low), float(high))
