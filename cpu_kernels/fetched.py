"""Experts that were fetched for what a router chose: run from where each of them lies now."""

from __future__ import annotations

from typing import Any

import numpy as np

from cpu_kernels.chain import Chain
from cpu_kernels.experts import EXPERTS, ExpertLayer, run_experts
from cpu_kernels.record import Record


class FetchedExperts:
    """`layer`'s experts, ready to be run on the rows that each is given."""

    def __init__(self, layer: ExpertLayer) -> None:
        self._layer = layer
        self._asks_who = "kinds" in layer.facts or "biases" in layer.facts
        self._record = Record(EXPERTS, **layer.facts)
        _ = run_experts.address  # compiled now rather than in the first token

    def run(
        self, chain: Chain, h: np.ndarray, addresses: np.ndarray, jobs: Any, out: np.ndarray
    ) -> None:
        """See Backend.experts. `jobs` has `experts`, `starts` and `pairs`; of the last two nobody
        may change what they hold."""
        num_jobs, num_pairs = len(jobs.starts) - 1, len(jobs.pairs)
        if num_jobs < 1:
            return
        if addresses.shape != (num_jobs, 3) or addresses.dtype != np.int64:
            raise ValueError(f"addresses must be int64 [{num_jobs}, 3]")
        chain.finish()  # other layers that wait use the workspace, too
        space = self._layer.workspace
        if not self._record.is_filled_for(h, out, num_jobs, num_pairs, space.version):
            self._fill(h, out, num_jobs, num_pairs)
        # Copied, because that is quicker than to ask for the address of a new array.
        space.arrays["addresses"][:num_jobs] = addresses
        if space.starts is not jobs.starts or space.pairs is not jobs.pairs:
            space.place(jobs.starts, jobs.pairs)
        if self._asks_who:
            space.arrays["experts"][:num_jobs] = jobs.experts
        chain.run(run_experts.address, self._record.address)

    def _fill(self, h: np.ndarray, out: np.ndarray, num_jobs: int, num_pairs: int) -> None:
        space, size = self._layer.workspace, self._layer.hidden_size
        top_k, remainder = divmod(len(out), len(h))
        if h.dtype != np.float32 or out.dtype != np.float32 or remainder:
            raise ValueError("h and out must be float32, with top_k rows of out for each of h")
        if h.shape[1] != size or out.shape[1] != size:
            raise ValueError(f"h and out must have {size} columns")
        space.reserve(len(h), size, num_pairs, self._layer.expert_size, num_jobs)
        self._record.set(
            **space.arrays, h=h, out=out, num_rows=len(h), num_jobs=num_jobs, top_k=top_k
        )
        self._record.mark_filled_for(h, out, num_jobs, num_pairs, space.version)
