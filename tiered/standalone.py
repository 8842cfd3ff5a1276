"""A model's experts without its decoder, for a library that has a decoder of its own."""

from __future__ import annotations

import threading
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import psutil

from tiered import memory
from tiered.backend import open_cpu
from tiered.budget import LONGEST_PASS, pass_bytes, plan_memory, workspace_bytes
from tiered.chunks import run_by_chunk
from tiered.config import EngineConfig
from tiered.experts import Routing, group_by_expert, prepared, weighted_once
from tiered.formats import open_checkpoint
from tiered.source import count, open_source
from tiered.stats import EngineStats
from tiered.store import ExpertStore
from tiered.whole_blocks import WholeBlocks


class StandaloneExperts:
    """The experts of a checkpoint, computed on the CPU under the budget that `choices` say.

    `others` is what else the process will hold, in bytes: its caller's weights. Only this file's
    expert tensors are read. Without a router there is no look-ahead: of the choices that concern
    it, the KV cache or a GPU, none is used. Close it, or use `with`, to end its threads. Raises
    CheckpointError for damaged or unknown files, MemoryError for budgets that cannot work,
    ValueError for a dense model.
    """

    def __init__(self, path: Path, choices: EngineConfig, others: int = 0) -> None:
        self.choices = choices
        self._lock = threading.Lock()  # one forward pass at a time
        with ExitStack() as stack:
            self.checkpoint = stack.enter_context(open_checkpoint(path))
            self.config = self.checkpoint.config
            if not self.config.sparse_layers:
                raise ValueError(f"{path} is a dense model: it has no experts")
            self.backend = open_cpu(choices)
            stack.callback(self.backend.close)
            self.store = stack.enter_context(ExpertStore(self.checkpoint, choices.quantize))
            blocks = WholeBlocks(self.store)
            self._blocks = blocks if blocks.pays else None
            below = self._blocks or self.store
            self.plan = plan_memory(
                limit=_bytes(choices.ram) or memory.default_limit(),
                expert_ram=_bytes(choices.expert_ram),
                process=psutil.Process().memory_info().rss,
                dense=others,
                kv=0,
                workspace=workspace_bytes(self.config, choices.prefill_chunk),
                experts=sum(below.layer_bytes),
                floor=max(below.blob_bytes) * self.config.top_k,
                mappable=self.store.mappable,
                chunk=choices.prefill_chunk,
                longest_pass=LONGEST_PASS,
                pass_bytes=pass_bytes(self.config),
            )
            self.source = open_source(self.store, self._blocks, self.plan, choices, stack)
            self._layers = {
                layer: prepared(self.backend, self.store.layouts(layer), self.config)
                for layer in self.config.sparse_layers
            }
            self._closing = stack.pop_all()

    def run(self, layer: int, h: np.ndarray, routing: Routing) -> np.ndarray:
        """The weighted sum of each token's experts: float32 [num_tokens, hidden_size].

        `h` is float32 [num_tokens, hidden_size], after the norm. ValueError for what does not fit
        the model.
        """
        config, experts = self.config, routing.experts
        if layer not in self._layers:
            raise ValueError(f"{self.checkpoint.path}: layer {layer} has no experts")
        if h.ndim != 2 or h.shape[1] != config.hidden_size or h.dtype != np.float32:
            raise ValueError(f"h must be float32 [num_tokens, {config.hidden_size}]")
        if experts.ndim != 2 or not len(experts) == len(routing.weights) == len(h):
            raise ValueError("the routing must have a row for each token")
        if experts.size and not 0 <= experts.min() <= experts.max() < config.num_experts:
            raise ValueError(f"expert ids must lie in 0 ... {config.num_experts - 1}")
        x, size = np.zeros(h.shape, np.float32), self.plan.pass_tokens
        with self._lock:
            for start in range(0, len(h), size):
                rows = slice(start, start + size)
                self._add(x[rows], layer, h[rows], Routing(*(part[rows] for part in routing)))
        return x

    def _add(self, x: np.ndarray, layer: int, h: np.ndarray, routing: Routing) -> None:
        """x += experts(h): Decoder.experts without the router."""
        jobs = group_by_expert(routing)
        given, weights = weighted_once(self.backend, h, routing.weights, self.config)
        out = self.backend.pair_outputs(routing.experts.size)  # [num_tokens * top_k, hidden_size]
        for ready, addresses in self.source.fetch(layer, jobs.experts, jobs.starts):
            run_by_chunk(
                self.backend, given, self._layers[layer], addresses, jobs.take(ready), out, len(h),
                self.choices.prefill_chunk,
            )  # fmt: skip
        self.backend.combine(x, out, weights)

    @property
    def stats(self) -> EngineStats:
        """Totals so far: hits, misses and bytes read."""
        stats = EngineStats()
        count(self.source, stats)
        return stats

    def close(self) -> None:
        """End the threads and unmap the files. Closing twice is harmless."""
        self._closing.close()

    def __enter__(self) -> StandaloneExperts:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _bytes(size: int | str | None) -> int | None:
    return None if size is None else memory.parse_bytes(size)
