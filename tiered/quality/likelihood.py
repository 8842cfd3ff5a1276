"""How likely a model holds the tokens that are there, and what else it would have said."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from tiered.text.sampling import log_softmax

ROWS = 16  # whose log-probabilities are held at once, in float64


def by_rows(num_rows: int) -> Iterator[slice]:
    for start in range(0, num_rows, ROWS):
        yield slice(start, min(start + ROWS, num_rows))


def token_log_probs(logits: np.ndarray, tokens: Sequence[int] | np.ndarray) -> np.ndarray:
    """Log-probability of one token per row of logits [num_rows, vocab_size]: float64."""
    tokens = np.asarray(tokens, np.int64)
    result = np.empty(len(tokens))
    for rows in by_rows(len(tokens)):
        chosen = tokens[rows]
        result[rows] = log_softmax(logits[rows])[np.arange(len(chosen)), chosen]
    return result
