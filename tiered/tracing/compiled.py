"""The compiled twin of a tier's bookkeeping, for traces and sweeps that would take Python long.

It gives the same counts, and knows the built-in policies whose decisions are arithmetic. Loading it
takes a second, compiling it once a quarter of a minute.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from importlib import import_module
from inspect import signature
from typing import TYPE_CHECKING

import numpy as np

from tiered import policies
from tiered.cache.residency import TierStats
from tiered.experts import ExpertKey
from tiered.policies import Policy, Space

if TYPE_CHECKING:
    from cpu_kernels.traces import Parsed
    from tiered.tracing.trace import Trace, TraceInfo

WORTH_LOADING = 1_000_000  # routed experts in all: Python takes seconds for them
KNOWN = frozenset(
    ["lru", "lfu", "layer_lru", "layer_lfu", "lfu_decay", "slru", "arc", "belady", "keep_last"]
)


def knows(policy: str | Callable[..., Policy], trace: Trace) -> bool:
    """Whether there is a twin of this policy, for this trace."""
    return isinstance(policy, str) and policy in KNOWN and trace.records.all_have_sizes


class Records:
    """A trace as integers, as the kernels read it: made once for all policies and budgets."""

    def __init__(self, info: TraceInfo, parsed: Parsed) -> None:
        self.info = info
        self.array = parsed.records  # int64
        self.num_routed = parsed.num_routed
        self.num_asked = parsed.num_asked  # how often demands and guesses name an expert
        is_named = parsed.is_named.reshape(len(info.blob_bytes), info.num_experts)
        self.all_have_sizes = bool(np.array(info.blob_bytes)[is_named.any(1)].all())

    @cached_property
    def future(self) -> tuple[np.ndarray, np.ndarray]:
        """See cpu_kernels.traces.future."""
        from cpu_kernels.traces import future

        num_keys = self.info.num_experts * len(self.info.blob_bytes)
        found: tuple[np.ndarray, np.ndarray] = future(self.array, num_keys)
        return found


def records_of(trace: Trace) -> Records:
    """ValueError if the trace names an expert that its model does not have."""
    from cpu_kernels.residency import DROPPED, FETCHED, PASS, PREFETCHED
    from cpu_kernels.traces import WHOLE, Parsed
    from tiered.tracing.trace import DECODE, Dropped, Fetched, Pass, Prefetched

    num_layers, num_experts = len(trace.info.blob_bytes), trace.info.num_experts
    records: list[int] = []
    is_named = np.zeros((num_layers, num_experts), np.uint8)
    num_asked = 0

    def numbered(keys: list[ExpertKey]) -> list[int]:
        for key in keys:
            if not (0 <= key.layer < num_layers and 0 <= key.expert < num_experts):
                raise ValueError(f"the trace names {key}, which its model does not have")
            is_named[key] = 1
        return [len(keys), *[layer * num_experts + expert for layer, expert in keys]]

    for event in trace.events:
        if isinstance(event, Fetched):
            records += FETCHED, -1 if event.num_asked is None else event.num_asked
            records += numbered(event.keys)
            num_asked += len(event.keys)
        elif isinstance(event, Pass):
            records += PASS, event.phase == DECODE
        elif isinstance(event, Prefetched):
            records += PREFETCHED, event.limit
            records += numbered(event.keys) + numbered(event.given_up)
            num_asked += len(event.keys)
        elif isinstance(event, Dropped):
            records += DROPPED, numbered([event.key])[1]
    parsed = Parsed(np.array(records, np.int64), is_named, trace.num_routed, num_asked, WHOLE, 0)
    return Records(trace.info, parsed)


def prepare(records: Records) -> None:
    """What is done once, for all policies and budgets: a replay is timed without it."""
    from cpu_kernels import residency

    residency.load()
    _ = records.future


def run(
    records: Records, policy: str, space: Space, as_published: bool
) -> tuple[TierStats, TierStats, int]:
    """What was counted, the part of decode passes, and how many these were."""
    from cpu_kernels.eviction import make_tier
    from cpu_kernels.residency import replay

    tier = make_tier(
        policy,
        _options(policy),
        space.capacity,
        _nbytes(space, records.info.num_experts),
        records.info.num_experts,
        records.num_asked,
        *records.future,
    )
    stats, decode, num_tokens = replay(tier, records.array, as_published)
    return TierStats(**stats), TierStats(**decode), num_tokens


def _nbytes(space: Space, num_experts: int) -> np.ndarray:
    """Of each expert's blob, int64 [num_layers, num_experts]."""
    table = np.repeat(np.array(space.blob_bytes, np.int64)[:, None], num_experts, axis=1)
    for layer, sizes in space.mixes.items():
        table[layer] = sizes
    return table


def _options(policy: str) -> list[float]:
    """What the policy's constructor takes beyond the space."""
    parameters = signature(import_module(f"{policies.__name__}.{policy}").Policy).parameters
    return [p.default for p in parameters.values() if isinstance(p.default, float)]
