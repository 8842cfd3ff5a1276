"""The output head: the last norm, and the logits of some rows."""

from __future__ import annotations

from typing import Any

import numpy as np

from cpu_kernels.gating import soft_cap
from cpu_kernels.linear import multiply, prepare_activations, prepared_bytes
from cpu_kernels.memory import load_f32, load_i32, word
from cpu_kernels.norm import apply_norm, layer_norm, norm_vectors, rms_scale
from cpu_kernels.record import Record, Scratch, fields
from cpu_kernels.team import Team, barrier, op, share

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

    def __init__(self, team: Team) -> None:
        self._team = team
        self._scratch = Scratch()
        self._record = Record(HEAD)

    def run(self, x: np.ndarray, rows: np.ndarray, layer: OutputLayer) -> np.ndarray:
        """Logits of the given rows of x (float32 [num_tokens, hidden_size]): a new float32
        [len(rows), vocab_size]. IndexError for rows that x does not have."""
        rows = np.ascontiguousarray(rows, np.int32)
        num_rows, hidden_size = len(rows), layer.hidden_size
        if x.dtype != np.float32 or x.shape != (len(x), hidden_size):
            raise ValueError(f"x must be float32 [num_tokens, {hidden_size}], not {x.shape}")
        logits = np.empty((num_rows, layer.vocab_size), np.float32)
        if not num_rows:
            return logits
        if rows.min() < 0 or rows.max() >= len(x):
            raise IndexError(f"rows must be 0 to {len(x) - 1}: {rows.min()} to {rows.max()}")
        room = self._scratch.room
        self._record.set(
            x=x,
            rows=rows,
            num_rows=num_rows,
            **layer.norm,
            eps=layer.eps,
            hidden_size=hidden_size,
            normed=room("normed", 4 * num_rows * hidden_size),
            prepared=room("prepared", prepared_bytes(num_rows, hidden_size)),
            head=layer.head.address,
            logits=logits,
            vocab_size=layer.vocab_size,
            softcap=layer.softcap,
        )
        self._team.run(head.address, self._record.address)
        return logits
