"""What a layer's router has chosen for one token, where all experts are in memory: Python need not
know of the choice before the experts run."""

from __future__ import annotations

from typing import Any

import numpy as np

from cpu_kernels.experts import COMBINE, EXPERTS, ExpertLayer, add_pairs, prepare_h, run_experts
from cpu_kernels.inner import inner
from cpu_kernels.lanes import store_i32
from cpu_kernels.memory import load_i32, store_word, word
from cpu_kernels.record import Record, fields
from cpu_kernels.team import Team, barrier, op

# `experts` and `combine` are addresses of such records, `chosen` that of the router's int32
# [top_k], `table` and `uses` those of tiered.experts.ExpertTable.
CHOSEN = fields("experts combine chosen table uses num_experts")


@inner
def _find(r):
    """Give each job the expert that was chosen for it."""
    experts, uses = word(r, CHOSEN.experts), word(r, CHOSEN.uses)
    ids, addresses = word(experts, EXPERTS.experts), word(experts, EXPERTS.addresses)
    for job in range(word(experts, EXPERTS.num_jobs)):
        expert = np.int64(load_i32(word(r, CHOSEN.chosen), job))
        # A router whose weights are damaged may choose none; it must not lead out of the table.
        expert = min(max(expert, 0), word(r, CHOSEN.num_experts) - 1)
        store_i32(ids, job, expert)
        store_word(uses, expert, word(uses, expert) + 1)
        for matrix in range(3):
            address = word(word(r, CHOSEN.table), 3 * expert + matrix)
            store_word(addresses, 3 * job + matrix, address)


@op
def _chosen(r, thread, num_threads, team):
    experts = word(r, CHOSEN.experts)
    if thread == num_threads - 1:
        _find(r)
    prepare_h(experts, thread, num_threads)
    barrier(team)
    run_experts(experts, thread, num_threads, team)
    barrier(team)
    add_pairs(word(r, CHOSEN.combine), thread, num_threads)


class ChosenExperts:
    """`layer`'s experts, ready to be run on what its router chose."""

    def __init__(self, layer: ExpertLayer) -> None:
        self._layer = layer
        self._experts, self._combine = Record(EXPERTS, **layer.facts), Record(COMBINE)
        self._record = Record(CHOSEN, experts=self._experts.address, combine=self._combine.address)
        _ = _chosen.address  # compiled before the first token

    def run(
        self,
        team: Team,
        h: np.ndarray,
        chosen: Any,
        table: Any,
        out: np.ndarray,
        into: np.ndarray,
    ) -> None:
        """into += what the experts say of h, weighted; all are float32 [1, hidden_size]. `chosen`
        has `experts` and `weights`, which may be known only when this is run; `out` is room for
        float32 [top_k, hidden_size]; `table` has `addresses` and `uses`, which are counted."""
        version = self._layer.workspace.version
        if not self._record.is_filled_for(h, chosen, table, out, into, version):
            self._fill(team, h, chosen, table, out, into)
        team.queue(_chosen.address, self._record.address)

    def _fill(
        self,
        team: Team,
        h: np.ndarray,
        chosen: Any,
        table: Any,
        out: np.ndarray,
        into: np.ndarray,
    ) -> None:
        team.forget()  # it may wait to be run as it is
        layer, top_k = self._layer, chosen.experts.shape[1]
        rows, results = (1, layer.hidden_size), (top_k, layer.hidden_size)
        for name, array, shape in (("h", h, rows), ("into", into, rows), ("out", out, results)):
            if array.dtype != np.float32 or array.shape != shape:
                raise ValueError(f"{name} must be float32 {list(shape)}, not {array.shape}")
        count = len(table.addresses)
        for array, shape in ((table.addresses, (count, 3)), (table.uses, (count,))):
            if array.dtype != np.int64 or array.shape != shape or not array.flags.c_contiguous:
                raise ValueError(f"a table's arrays must be contiguous int64, like {list(shape)}")
        space = layer.workspace
        space.reserve(1, layer.hidden_size, top_k, layer.expert_size, top_k)
        identity = space.arrays["identity"]  # each pair is a job of its own
        own = {
            "starts": identity, "pairs": identity, "experts": np.zeros(top_k, np.int32),
            "addresses": np.zeros((top_k, 3), np.int64),
        }  # fmt: skip
        self._experts.set(
            **(space.arrays | own), h=h, out=out, num_rows=1, num_jobs=top_k, top_k=top_k
        )
        self._combine.set(
            x=into, out=out, weights=chosen.weights, num_rows=1, top_k=top_k,
            hidden_size=layer.hidden_size,
        )  # fmt: skip
        self._record.set(
            chosen=chosen.experts, table=table.addresses, uses=table.uses, num_experts=count
        )
        self._record.mark_filled_for(h, chosen, table, out, into, space.version)
