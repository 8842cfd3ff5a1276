"""A gated short convolution in the place of attention, in one call: what a layer remembers of a
text are the last few tokens. https://arxiv.org/abs/2511.23404
"""

from __future__ import annotations

from typing import Any

import numpy as np

from cpu_kernels.linear import multiply, prepare_activations, prepared_bytes
from cpu_kernels.memory import load_f32, word
from cpu_kernels.norm import add, apply_norm, rms_norm_rows
from cpu_kernels.record import Record, check_shapes, fields, floats
from cpu_kernels.recurrent import convolve
from cpu_kernels.team import barrier, op, share

CONV_BATCH = fields("x num_rows runs normed prepared gates gated mixed out")
CONV = fields("batch hidden_size eps norm gates conv conv_size history o")


@op
def short_conv(layer, thread, num_threads, team):
    """A row of `gates` has b, c and v: x += o(c * convolution(b * v))."""
    batch, size = word(layer, CONV.batch), word(layer, CONV.hidden_size)
    num_rows, prepared = word(batch, CONV_BATCH.num_rows), word(batch, CONV_BATCH.prepared)
    x, normed = word(batch, CONV_BATCH.x), word(batch, CONV_BATCH.normed)
    gates, gated = word(batch, CONV_BATCH.gates), word(batch, CONV_BATCH.gated)
    mixed, out = word(batch, CONV_BATCH.mixed), word(batch, CONV_BATCH.out)
    lo, hi = share(num_rows, thread, num_threads)
    rms_norm_rows(x, word(layer, CONV.norm), normed, lo, hi, size, load_f32(layer, 2 * CONV.eps))
    barrier(team)
    prepare_activations(normed, size, num_rows, size, prepared, thread, num_threads)
    barrier(team)
    multiply(word(layer, CONV.gates), prepared, num_rows, gates, 3 * size, team, 0)
    barrier(team)
    for row in range(lo, hi):
        b = gates + 12 * row * size
        apply_norm(b, b + 8 * size, gated + 4 * row * size, size, np.float32(1.0))
    barrier(team)
    convolve(
        word(batch, CONV_BATCH.runs), gated, mixed, word(layer, CONV.conv), 0, size,
        word(layer, CONV.conv_size), word(layer, CONV.history), False, thread, num_threads,
    )  # fmt: skip
    barrier(team)
    for row in range(lo, hi):
        c, at = gates + 12 * row * size + 4 * size, mixed + 4 * row * size
        apply_norm(at, c, at, size, np.float32(1.0))
    barrier(team)
    prepare_activations(mixed, size, num_rows, size, prepared, thread, num_threads)
    barrier(team)
    multiply(word(layer, CONV.o), prepared, num_rows, out, size, team, 1)
    barrier(team)
    lo, hi = share(num_rows * size, thread, num_threads)
    add(x + 4 * lo, out + 4 * lo, hi - lo)


class ConvLayer:
    """A layer's weights, ready for `RecurrentLayers.run`. `weights` has the attributes of
    tiered.backend.ConvWeights, its matrices are Matrix; `number` counts such layers from 0."""

    def __init__(self, weights: Any, config: Any, number: int, batch: Record) -> None:
        size, w = config.hidden_size, weights
        shapes = {
            "gates": (3 * size, size),
            "conv": (config.conv_size, size),
            "o": (size, size),
        }
        check_shapes("convolution", w, shapes)
        self.hidden_size = size
        self._weights = w  # the record has only their addresses
        self.record = Record(
            CONV,
            batch=batch.address,
            hidden_size=size,
            eps=float(config.norm_eps),
            norm=floats(w.norm, "norm", size),
            gates=w.gates.address,
            conv=np.ascontiguousarray(w.conv, np.float32),
            conv_size=config.conv_size,
            history=4 * number * config.state_values,
            o=w.o.address,
        )
        self.op = short_conv
        _ = self.op.address  # compiled before the first token

    def rooms(self, n: int) -> dict[str, int]:
        """Bytes that n tokens need."""
        size = self.hidden_size
        rooms = dict.fromkeys(("normed", "gated", "mixed", "out"), 4 * n * size)
        return {**rooms, "gates": 12 * n * size, "prepared": prepared_bytes(n, size)}
