"""What a layer's router has chosen, where all experts are in memory: Python need not know of the
choice before the experts run."""

from __future__ import annotations

from typing import Any

import numpy as np

from cpu_kernels.atomic import call_op
from cpu_kernels.chain import Chain
from cpu_kernels.combine import COMBINE, add_pairs
from cpu_kernels.compiler import inner
from cpu_kernels.experts import EXPERTS, ExpertLayer, run_experts
from cpu_kernels.lanes import store_i32
from cpu_kernels.memory import load_i32, store_word, word
from cpu_kernels.record import Record, fields
from cpu_kernels.team import barrier, op

# `run` is the address of run_experts, `experts` and `combine` those of such records, `chosen` that
# of the router's int32 [num_pairs], `table` and `uses` those of tiered.experts.ExpertTable,
# `places` that of int32 [num_experts].
CHOSEN = fields("run experts combine chosen num_pairs table uses num_experts places")


@inner
def _expert(r, pair):
    # A router whose weights are damaged may choose none; it must not lead out of the table.
    expert = np.int64(load_i32(word(r, CHOSEN.chosen), pair))
    return min(max(expert, 0), word(r, CHOSEN.num_experts) - 1)


@inner
def _add_job(r, job, expert, start):
    """Job number `job` is of `expert`, and of the pairs from number `start` on."""
    experts, uses = word(r, CHOSEN.experts), word(r, CHOSEN.uses)
    store_i32(word(experts, EXPERTS.experts), job, expert)
    store_i32(word(experts, EXPERTS.starts), job, start)
    store_word(uses, expert, word(uses, expert) + 1)
    for matrix in range(3):
        address = word(word(r, CHOSEN.table), 3 * expert + matrix)
        store_word(word(experts, EXPERTS.addresses), 3 * job + matrix, address)


@inner
def _group(r):
    """Make each expert that was chosen a job, with all pairs that it was chosen for."""
    experts, places = word(r, CHOSEN.experts), word(r, CHOSEN.places)
    num_experts, num_pairs = word(r, CHOSEN.num_experts), word(r, CHOSEN.num_pairs)
    for expert in range(num_experts):
        store_i32(places, expert, 0)
    for pair in range(num_pairs):
        expert = _expert(r, pair)
        store_i32(places, expert, load_i32(places, expert) + 1)
    num_jobs, start = 0, 0
    for expert in range(num_experts):
        count = np.int64(load_i32(places, expert))
        if count > 0:
            _add_job(r, num_jobs, expert, start)
            store_i32(places, expert, start)
            num_jobs, start = num_jobs + 1, start + count
    store_i32(word(experts, EXPERTS.starts), num_jobs, start)
    store_word(experts, EXPERTS.num_jobs, num_jobs)
    for pair in range(num_pairs):
        expert = _expert(r, pair)
        place = np.int64(load_i32(places, expert))
        store_i32(word(experts, EXPERTS.pairs), place, pair)
        store_i32(places, expert, place + 1)


@op
def _chosen(r, thread, num_threads, team):
    experts = word(r, CHOSEN.experts)
    if thread == num_threads - 1:
        _group(r)
    call_op(word(r, CHOSEN.run), experts, thread, num_threads, team)
    barrier(team)
    add_pairs(word(r, CHOSEN.combine), thread, num_threads)


class ChosenExperts:
    """`layer`'s experts, ready to be run on what its router chose."""

    def __init__(self, layer: ExpertLayer) -> None:
        self._layer, self._top_k = layer, 0
        self._experts, self._combine = Record(EXPERTS, **layer.facts), Record(COMBINE)
        self._record = Record(
            CHOSEN,
            run=run_experts.address,
            experts=self._experts.address,
            combine=self._combine.address,
        )
        _ = _chosen.address  # compiled before the first token

    def run(self, chain: Chain, routed: Any, table: Any, out: np.ndarray, into: np.ndarray) -> None:
        """into (float32 [num_tokens, hidden_size]) += what the experts say of so many first rows
        of `routed` (see cpu_kernels.route.Routed), weighted. What is routed may be known only when
        this is run. `table` has `addresses` and `uses`: how often each expert was used, however
        many of these tokens chose it. `out` is memory for float32 [most_rows * top_k, hidden_size],
        for as many rows as `routed` has."""
        version = self._layer.workspace.version
        if not (
            self._record.is_filled_for(routed, table, out, version)
            and self._combine.points_to(x=into)
        ):
            self._fill(chain, routed, table, out, into)
        self.resize(len(into))
        chain.queue(_chosen.address, self._record.address, resize=self.resize)

    def resize(self, num_rows: int) -> None:
        """So many tokens are there when this is run next."""
        self._experts.resize(num_rows=num_rows)
        self._combine.resize(num_rows=num_rows)
        self._record.resize(num_pairs=num_rows * self._top_k)

    def _fill(
        self, chain: Chain, routed: Any, table: Any, out: np.ndarray, into: np.ndarray
    ) -> None:
        chain.forget()  # it may wait to be run as it is
        layer, (most_rows, top_k) = self._layer, routed.experts.shape
        self._top_k, most_pairs, size = top_k, most_rows * top_k, layer.hidden_size
        for name, array, shape in (
            ("h", routed.h, (most_rows, size)), ("into", into, (len(into), size)),
        ):  # fmt: skip
            if array.dtype != np.float32 or array.shape != shape:
                raise ValueError(f"{name} must be float32 {list(shape)}, not {array.shape}")
        if len(into) > most_rows or out.nbytes < 4 * most_pairs * size:
            raise ValueError(f"{len(into)} tokens and {out.nbytes} bytes do not fit {most_rows}")
        count = len(table.addresses)
        for array, shape in ((table.addresses, (count, 3)), (table.uses, (count,))):
            if array.dtype != np.int64 or array.shape != shape or not array.flags.c_contiguous:
                raise ValueError(f"a table's arrays must be contiguous int64, like {list(shape)}")
        space, most_jobs = layer.workspace, min(most_pairs, count)
        space.reserve(most_rows, size, most_pairs, layer.expert_size, most_jobs)
        own = {
            "starts": np.zeros(most_jobs + 1, np.int32), "pairs": np.zeros(most_pairs, np.int32),
            "experts": np.zeros(most_jobs, np.int32),
            "addresses": np.zeros((most_jobs, 3), np.int64),
        }  # fmt: skip
        self._experts.set(**(space.arrays | own), h=routed.h, out=out, top_k=top_k)
        self._combine.set(x=into, out=out, weights=routed.weights, top_k=top_k, hidden_size=size)
        self._record.set(
            chosen=routed.experts, table=table.addresses, uses=table.uses, num_experts=count,
            places=np.zeros(count, np.int32),
        )  # fmt: skip
        self._record.mark_filled_for(routed, table, out, space.version)
