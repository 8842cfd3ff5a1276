"""The dense feed-forward: an expert that every row uses, added to x."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from cpu_kernels.atomic import call_op
from cpu_kernels.chain import Chain
from cpu_kernels.combine import add_scaled
from cpu_kernels.experts import EXPERTS, ExpertLayer, run_experts
from cpu_kernels.gating import sigmoid
from cpu_kernels.isa import Isa
from cpu_kernels.linear import multiply
from cpu_kernels.memory import load_f32, word
from cpu_kernels.norm import apply_norm, rms_scale
from cpu_kernels.record import Record, fields
from cpu_kernels.team import barrier, op, share
from cpu_kernels.workspace import Workspace, room_for

FEED_FORWARD = fields("run experts x target norm eps scale scores")


@op
def _feed_forward(r, thread, num_threads, team):
    experts = word(r, FEED_FORWARD.experts)
    x, scale = word(r, FEED_FORWARD.x), word(r, FEED_FORWARD.scale)
    num_rows, hidden = word(experts, EXPERTS.num_rows), word(experts, EXPERTS.hidden_size)
    norm, scores = word(r, FEED_FORWARD.norm), word(r, FEED_FORWARD.scores)
    first, last = share(num_rows, thread, num_threads)
    if norm != 0:
        for row in range(first, last):
            source = x + 4 * row * hidden
            factor = rms_scale(source, hidden, load_f32(r, 2 * FEED_FORWARD.eps))
            target = word(experts, EXPERTS.h) + 4 * row * hidden
            apply_norm(source, norm, target, hidden, factor)
        barrier(team)
    call_op(word(r, FEED_FORWARD.run), experts, thread, num_threads, team)
    if scale != 0:
        prepared = word(experts, EXPERTS.prepared)
        multiply(scale, prepared, num_rows, scores, 1, team, 2)
    barrier(team)
    out, target = word(experts, EXPERTS.out), word(r, FEED_FORWARD.target)
    for row in range(first, last):
        factor = sigmoid(load_f32(scores, row)) if scale != 0 else 1.0
        add_scaled(target + 4 * row * hidden, out + 4 * row * hidden, hidden, factor)


class _Layout(NamedTuple):
    gate: Any
    up: Any
    down: Any


class FeedForwardLayer:
    """x (or `into`) += ffn(h), times sigmoid(scale @ h) if there is a scale; `weights` has matrices
    gate, up, down and scale (or None). With `norm` (float32 [hidden_size]), h = norm(x)."""

    def __init__(
        self,
        weights: Any,
        config: Any,
        isa: Isa,
        exact: bool,
        workspace: Workspace,
        norm: np.ndarray | None = None,
    ) -> None:
        self.weights, self.workspace = weights, workspace
        layout = _Layout(weights.gate, weights.up, weights.down)
        self.layer = ExpertLayer(layout, config, isa, exact, workspace)
        addresses = [matrix.data.ctypes.data for matrix in layout]
        self._addresses = np.array([addresses], np.int64)
        self.norm = None if norm is None else np.ascontiguousarray(norm, np.float32)
        scale = weights.scale.address if weights.scale is not None else 0
        self._experts = Record(EXPERTS, **self.layer.facts)
        self._record = Record(
            FEED_FORWARD,
            run=run_experts.address,
            experts=self._experts.address,
            eps=float(config.norm_eps),
            scale=scale,
        )
        self._starts = np.zeros(2, np.int32)  # its own, as several layers may wait to be run
        self._most_rows = 0
        _ = _feed_forward.address

    def run(
        self, chain: Chain, x: np.ndarray, h: np.ndarray | None, into: np.ndarray | None = None
    ) -> None:
        target, num_rows = x if into is None else into, len(x)
        if not (
            self._record.is_filled_for(self.workspace.version, h is None)
            and num_rows <= self._most_rows
            and self._record.points_to(x=x, target=target)
            and (h is None or self._experts.points_to(h=h))
        ):
            self._fill(chain, x, h, target)
        self.resize(num_rows)
        chain.queue(_feed_forward.address, self._record.address, resize=self.resize)

    def resize(self, num_rows: int) -> None:
        """So many rows are there when this is run next."""
        self._experts.resize(num_rows=num_rows)
        self._starts[1] = num_rows

    def _fill(self, chain: Chain, x: np.ndarray, h: np.ndarray | None, target: np.ndarray) -> None:
        if h is None and self.norm is None:
            raise ValueError("this feed-forward was prepared without a norm: give it h")
        chain.forget()  # it may wait to be run as it is
        space, hidden = self.workspace, x.shape[1]
        self._most_rows = most = max(self._most_rows, room_for(len(x)))
        space.reserve(most, hidden, most, self.layer.expert_size)
        space.reserve_dense(most, hidden)
        own = {
            "addresses": self._addresses, "starts": self._starts, "pairs": space.arrays["identity"]
        }  # fmt: skip
        self._experts.set(**(space.arrays | own))
        self._experts.set(
            h=space.dense["h"] if h is None else h, out=space.dense["out"], num_jobs=1, top_k=1
        )
        norm = self.norm if h is None else None
        self._record.set(x=x, target=target, scores=space.dense["scores"], norm=norm)
        self._record.mark_filled_for(space.version, h is None)
