"""What a layer that drafts tokens begins with: a token's embedding and the hidden state before it,
each normed, side by side, through one projection."""

from __future__ import annotations

from typing import Any

import numpy as np

from cpu_kernels.chain import Chain
from cpu_kernels.linear import multiply, prepare_activations, prepared_bytes
from cpu_kernels.memory import load_f32, word
from cpu_kernels.norm import apply_norm, rms_scale
from cpu_kernels.record import Record, Scratch, fields, floats
from cpu_kernels.team import barrier, op, share

JOIN = fields(
    "x hidden num_rows hidden_size embedding_norm last_norm hidden_norm eps joined prepared "
    "projection"
)


@op
def join(r, thread, num_threads, team):
    num_rows, size = word(r, JOIN.num_rows), word(r, JOIN.hidden_size)
    eps, joined, prepared = load_f32(r, 2 * JOIN.eps), word(r, JOIN.joined), word(r, JOIN.prepared)
    lo, hi = share(num_rows, thread, num_threads)
    for row in range(lo, hi):
        x = word(r, JOIN.x) + 4 * row * size
        hidden = word(r, JOIN.hidden) + 4 * row * size
        left = joined + 8 * row * size
        right = left + 4 * size
        apply_norm(x, word(r, JOIN.embedding_norm), left, size, rms_scale(x, size, eps))
        apply_norm(hidden, word(r, JOIN.last_norm), right, size, rms_scale(hidden, size, eps))
        apply_norm(right, word(r, JOIN.hidden_norm), right, size, rms_scale(right, size, eps))
    barrier(team)
    prepare_activations(joined, 2 * size, num_rows, 2 * size, prepared, thread, num_threads)
    barrier(team)
    multiply(word(r, JOIN.projection), prepared, num_rows, word(r, JOIN.x), size, team, 0)


class JoinLayer:
    """`weights` has the attributes of tiered.backend.JoinWeights; its projection is a Matrix."""

    def __init__(self, weights: Any, config: Any) -> None:
        size = config.hidden_size
        if tuple(weights.projection.shape) != (size, 2 * size):
            raise ValueError(
                f"the projection must have shape {(size, 2 * size)}, "
                f"not {tuple(weights.projection.shape)}"
            )
        self._weights = weights  # the record has only their addresses
        names = "embedding_norm", "last_norm", "hidden_norm"
        self.hidden_size = size
        self.record = Record(
            JOIN,
            **{name: floats(getattr(weights, name), name, size) for name in names},
            hidden_size=size,
            eps=float(config.norm_eps),
            projection=weights.projection.address,
        )
        _ = join.address  # compiled before the first token


class Join:
    """Runs join layers; one call at a time."""

    def __init__(self, chain: Chain) -> None:
        self._chain = chain
        self._scratch = Scratch()

    def run(self, x: np.ndarray, hidden: np.ndarray, layer: JoinLayer) -> None:
        """x = projection @ [norm(x), norm(last_norm(hidden))], both float32 [num_tokens,
        hidden_size]."""
        shape = len(x), layer.hidden_size
        if not x.shape == hidden.shape == shape or not x.dtype == hidden.dtype == np.float32:
            raise ValueError(f"x and hidden must be float32 {shape}: {x.shape}, {hidden.shape}")
        room, columns = self._scratch.room, 2 * layer.hidden_size
        layer.record.set(
            x=x,
            hidden=np.ascontiguousarray(hidden),
            num_rows=len(x),
            joined=room("joined", 4 * len(x) * columns),
            prepared=room("prepared", prepared_bytes(len(x), columns)),
        )
        self._chain.run(join.address, layer.record.address)
