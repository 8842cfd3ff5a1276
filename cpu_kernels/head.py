"""The output head: the last norm, and the logits of some rows."""

from __future__ import annotations

from typing import Any

import numpy as np

from cpu_kernels.chain import OF_HEAD, Chain
from cpu_kernels.gating import soft_cap
from cpu_kernels.linear import multiply, prepare_activations, prepared_bytes
from cpu_kernels.memory import load_f32, load_i32, word
from cpu_kernels.norm import apply_norm, layer_norm, norm_vectors, rms_scale
from cpu_kernels.record import Record, Scratch, fields
from cpu_kernels.team import barrier, op, share

HEAD = fields(
    "x rows num_rows norm norm_bias eps hidden_size normed prepared head logits vocab_size softcap"
)


@op
def head(r, thread, num_threads, team):
    num_rows, hidden_size = word(r, HEAD.num_rows), word(r, HEAD.hidden_size)
    normed, prepared = word(r, HEAD.normed), word(r, HEAD.prepared)
    lo, hi = share(num_rows, thread, num_threads)
    for i in range(lo, hi):
        x = word(r, HEAD.x) + 4 * hidden_size * load_i32(word(r, HEAD.rows), i)
        out, eps, bias = normed + 4 * i * hidden_size, load_f32(r, 2 * HEAD.eps), HEAD.norm_bias
        if word(r, bias):
            layer_norm(x, word(r, HEAD.norm), word(r, bias), out, hidden_size, eps)
        else:
            apply_norm(x, word(r, HEAD.norm), out, hidden_size, rms_scale(x, hidden_size, eps))
    barrier(team)
    prepare_activations(normed, hidden_size, num_rows, hidden_size, prepared, thread, num_threads)
    barrier(team)
    logits, vocab_size = word(r, HEAD.logits), word(r, HEAD.vocab_size)
    multiply(word(r, HEAD.head), prepared, num_rows, logits, vocab_size, team, 0)
    softcap = load_f32(r, 2 * HEAD.softcap)
    if softcap != np.float32(0.0):
        barrier(team)
        lo, hi = share(num_rows * vocab_size, thread, num_threads)
        soft_cap(logits + 4 * lo, hi - lo, softcap)


class OutputLayer:
    """`norm` is float32 [hidden_size], or [2, hidden_size] with biases; `head` a Matrix
    [vocab_size, hidden_size]."""

    def __init__(self, norm: np.ndarray, head: Any, config: Any) -> None:
        self.vocab_size, self.hidden_size = head.shape
        self.norm = norm_vectors(norm, self.hidden_size)
        self.head = head
        self.eps, self.softcap = float(config.norm_eps), float(config.logit_softcap)


class Head:
    """Runs output layers; one call at a time."""

    def __init__(self, chain: Chain) -> None:
        self._chain = chain
        self._scratch = Scratch()
        self._record = Record(HEAD)
        self._rows = np.empty(0, np.int32)

    def run(self, x: np.ndarray, rows: np.ndarray, layer: OutputLayer) -> np.ndarray:
        """Logits of the given rows of x (float32 [num_tokens, hidden_size]): a new float32
        [len(rows), vocab_size]. IndexError for rows that x does not have."""
        num_rows = len(rows)
        if x.dtype != np.float32 or x.shape != (len(x), layer.hidden_size):
            raise ValueError(f"x must be float32 [num_tokens, {layer.hidden_size}], not {x.shape}")
        logits = np.empty((num_rows, layer.vocab_size), np.float32)
        if not num_rows:
            return logits
        numbers = rows.tolist()
        if min(numbers) < 0 or max(numbers) >= len(x):
            raise IndexError(f"rows must be 0 to {len(x) - 1}: {min(numbers)} to {max(numbers)}")
        if not self._record.is_filled_for(x, layer, num_rows):
            self._fill(x, layer, num_rows)
        # Copied, because that is quicker than to ask for the address of a new array.
        self._rows[:] = numbers
        self._record.set(logits=logits)
        self._chain.run(head.address, self._record.address, OF_HEAD)
        return logits

    def _fill(self, x: np.ndarray, layer: OutputLayer, num_rows: int) -> None:
        room, hidden_size = self._scratch.room, layer.hidden_size
        self._rows = np.empty(num_rows, np.int32)
        self._record.set(
            x=x,
            rows=self._rows,
            num_rows=num_rows,
            **layer.norm,
            eps=layer.eps,
            hidden_size=hidden_size,
            normed=room("normed", 4 * num_rows * hidden_size),
            prepared=room("prepared", prepared_bytes(num_rows, hidden_size)),
            head=layer.head.address,
            vocab_size=layer.vocab_size,
            softcap=layer.softcap,
        )
        self._record.mark_filled_for(x, layer, num_rows)
