"""Token embeddings: rows of a table of any number format."""

from __future__ import annotations

from typing import Any

import numpy as np

from cpu_kernels.linear import gather_rows
from cpu_kernels.memory import load_f32, word
from cpu_kernels.norm import scaled_copy
from cpu_kernels.record import Record, Scratch, fields
from cpu_kernels.team import Team, barrier, op, share

EMBED = fields("table tokens num_rows out hidden_size scale")


@op
def embed(r, thread, num_threads, team):
    hidden_size = word(r, EMBED.hidden_size)
    gather_rows(
        word(r, EMBED.table), word(r, EMBED.tokens), word(r, EMBED.num_rows), word(r, EMBED.out),
        hidden_size, thread, num_threads,
    )  # fmt: skip
    scale, out = load_f32(r, 2 * EMBED.scale), word(r, EMBED.out)
    if scale != np.float32(1.0):
        barrier(team)
        lo, hi = share(word(r, EMBED.num_rows) * hidden_size, thread, num_threads)
        scaled_copy(out + 4 * lo, out + 4 * lo, hi - lo, scale)


class Embedding:
    """Looks tokens up; one call at a time."""

    def __init__(self, team: Team) -> None:
        self._team = team
        self._scratch = Scratch()
        self._record = Record(EMBED)

    def run(self, table: Any, tokens: np.ndarray, scale: float) -> np.ndarray:
        """float32 [num_tokens, hidden_size], until the next call. `table` is a Matrix
        [vocab_size, hidden_size], whose rows are multiplied with `scale`; IndexError for a token
        that it does not have."""
        vocab_size, hidden_size = table.shape
        tokens = np.ascontiguousarray(tokens, np.int32)
        num_rows = len(tokens)
        if num_rows and (tokens.min() < 0 or tokens.max() >= vocab_size):
            raise IndexError(
                f"token ids must be 0 to {vocab_size - 1}, not {tokens.min()} to {tokens.max()}"
            )
        x = self._scratch.floats("x", num_rows, hidden_size)
        self._record.set(
            table=table.address, tokens=tokens, num_rows=num_rows, out=x, hidden_size=hidden_size,
            scale=float(scale),
        )  # fmt: skip
        if num_rows:
            self._team.run(embed.address, self._record.address)
        return x
