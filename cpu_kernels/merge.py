"""What a layer with norms after its branches adds: a dense feed-forward's result and its experts',
each normed, their sum normed again; then the layer's scale."""

from __future__ import annotations

from typing import Any

import numpy as np

from cpu_kernels.chain import Chain
from cpu_kernels.memory import load_f32, word
from cpu_kernels.norm import add, apply_norm, rms_scale, scaled_copy
from cpu_kernels.record import Record, Scratch, fields, floats
from cpu_kernels.team import op, share

MERGE = fields("x dense routed num_rows hidden_size dense_norm routed_norm norm eps scale")


@op
def _merge(r, thread, num_threads, team):
    size, eps = word(r, MERGE.hidden_size), load_f32(r, 2 * MERGE.eps)
    low, high = share(word(r, MERGE.num_rows), thread, num_threads)
    for row in range(low, high):
        x, dense, routed = (
            word(r, MERGE.x) + 4 * row * size,
            word(r, MERGE.dense) + 4 * row * size,
            word(r, MERGE.routed) + 4 * row * size,
        )
        apply_norm(dense, word(r, MERGE.dense_norm), dense, size, rms_scale(dense, size, eps))
        apply_norm(routed, word(r, MERGE.routed_norm), routed, size, rms_scale(routed, size, eps))
        add(dense, routed, size)
        apply_norm(dense, word(r, MERGE.norm), dense, size, rms_scale(dense, size, eps))
        add(x, dense, size)
        scaled_copy(x, x, size, load_f32(r, 2 * MERGE.scale))


class MergeLayer:
    """`weights` has the attributes of tiered.backend.MergeWeights."""

    def __init__(self, weights: Any, config: Any) -> None:
        names = ("dense_norm", "routed_norm", "norm")
        size = config.hidden_size
        norms = {name: floats(getattr(weights, name), name, size) for name in names}
        self.record = Record(
            MERGE, **norms, hidden_size=size, eps=float(config.norm_eps), scale=float(weights.scale)
        )
        _ = _merge.address  # compiled before the first token


class Merge:
    """Runs merge layers; one call at a time."""

    def __init__(self, chain: Chain) -> None:
        self._chain = chain
        self._scratch = Scratch()

    def branches(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Two arrays like x, filled with zeros, until the next call."""
        self._chain.forget()  # a layer before may use them
        dense, routed = (self._scratch.floats(name, *x.shape) for name in ("dense", "routed"))
        dense[:], routed[:] = 0.0, 0.0
        return dense, routed

    def run(self, x: np.ndarray, dense: np.ndarray, routed: np.ndarray, layer: MergeLayer) -> None:
        """x = (x + norm(norm(dense) + norm(routed))) * scale; uses the branches up."""
        if not layer.record.is_filled_for(x, dense, routed):
            if not x.shape == dense.shape == routed.shape:
                raise ValueError(f"shapes differ: {x.shape}, {dense.shape}, {routed.shape}")
            layer.record.set(x=x, dense=dense, routed=routed, num_rows=len(x))
            layer.record.mark_filled_for(x, dense, routed)
        self._chain.queue(_merge.address, layer.record.address)
