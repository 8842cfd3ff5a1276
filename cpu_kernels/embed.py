"""Token embeddings: rows of a table of any number format."""

from __future__ import annotations

from typing import Any

import numpy as np

from cpu_kernels.chain import OF_ATTENTION, Chain, before_each_run
from cpu_kernels.linear import gather_rows
from cpu_kernels.memory import load_f32, word
from cpu_kernels.norm import scaled_copy
from cpu_kernels.record import Record, Scratch, fields
from cpu_kernels.team import barrier, op, share
from cpu_kernels.workspace import room_for

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

    def __init__(self, chain: Chain) -> None:
        self._chain = chain
        self._scratch = Scratch()
        self._record = Record(EMBED)
        self._tokens = np.empty(0, np.int32)

    def run(self, table: Any, tokens: np.ndarray, scale: float) -> np.ndarray:
        """float32 [num_tokens, hidden_size], until the next call. `table` is a Matrix
        [vocab_size, hidden_size], whose rows are multiplied with `scale`; IndexError for a token
        that it does not have."""
        x = self.fill(table, tokens, scale)
        if len(tokens):
            record = self._record.address
            self._chain.queue(embed.address, record, OF_ATTENTION, before_each_run)
        return x

    def fill(self, table: Any, tokens: np.ndarray, scale: float) -> np.ndarray:
        """The same, where the op is run by others: where it will write."""
        num_rows, (vocab_size, hidden_size) = len(tokens), table.shape
        ids = tokens.tolist()
        if num_rows and (min(ids) < 0 or max(ids) >= vocab_size):
            raise IndexError(
                f"token ids must be 0 to {vocab_size - 1}, not {min(ids)} to {max(ids)}"
            )
        self._scratch.room("x", 4 * room_for(num_rows) * hidden_size)  # in one place
        x = self._scratch.floats("x", num_rows, hidden_size)
        if not self._record.is_filled_for(x, table, scale):
            self._chain.finish_batch()
            self._tokens = np.empty(num_rows, np.int32)
            self._record.set(
                table=table.address, tokens=self._tokens, num_rows=num_rows, out=x,
                hidden_size=hidden_size, scale=float(scale),
            )  # fmt: skip
            self._record.mark_filled_for(x, table, scale)
        # Copied, because that is quicker than to ask for the address of a new array.
        self._tokens[:] = ids
        return x
