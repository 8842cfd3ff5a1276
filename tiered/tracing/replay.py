"""Replay: a recorded trace through a tier's own bookkeeping, with any policy and any budget.

Long traces run through its compiled twin (compiled.py), which gives the same counts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from time import perf_counter
from typing import Any, NamedTuple

from tiered import policies
from tiered.cache.residency import Residency, TierStats, check_capacity
from tiered.experts import ExpertKey
from tiered.policies import Evictable, Policy, Space
from tiered.tracing import compiled
from tiered.tracing.trace import DECODE, Dropped, Event, Fetched, Pass, Prefetched, Trace


@dataclass(frozen=True)
class ReplayResult:
    """Hit rates in per cent of the distinct experts that layers asked for."""

    policy: str
    budget_bytes: int
    counting: str
    hits: int
    misses: int
    hit_pct_cum: float  # prefill and decode
    hit_pct_decode: float
    read_bytes: int  # on demand
    decode_read_bytes: int
    prefetch_bytes: int
    prefetches: int
    prefetches_used: int
    prefetches_wasted: int
    evictions: int
    num_routed: int
    num_tokens: int  # decoded
    seconds: float

    @property
    def bytes_per_token(self) -> float:
        """Read on demand by an average decode pass."""
        return self.decode_read_bytes / max(1, self.num_tokens)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class PublishedResidency(Residency):
    """Counts as the published hit rates for CSV traces do.

    A batch first gets all it asks for; then experts that it did not use are evicted until the
    budget holds. So a batch that is larger than the budget exceeds it, and so do policies that
    keep something for every layer, if the budget is less than that. A policy may say itself what
    has to go after a layer's batch: `surplus(layer, bytes above the budget, evictable)`.
    """

    def __init__(self, space: Space, policy: Policy) -> None:
        super().__init__(space, policy)
        self._surplus = getattr(policy, "surplus", self._any_surplus)

    def demand(self, keys: Sequence[ExpertKey], num_asked: int | None = None) -> None:
        self.lookup(keys)
        batch, layer = set(keys), keys[0].layer
        while True:
            excess = self.used - self.space.capacity
            victim = self._surplus(layer, excess, lambda key: key not in batch)
            if victim is None:
                break
            self._leave(victim)
            self.stats.evictions += 1
        self.vacated.clear()

    def _admit(self, key: ExpertKey, evictable: Evictable) -> int:
        self._slots[key] = 0  # nothing is in any slot
        self.used += self._nbytes(key)
        return 0

    def _any_surplus(self, layer: int, excess: int, evictable: Evictable) -> ExpertKey | None:
        return self.policy.victim(evictable) if excess > 0 else None


RESIDENCIES = {"exact": Residency, "published": PublishedResidency}


def replay(
    trace: Trace,
    policy: str | Callable[..., Policy],
    budget_bytes: int,
    counting: str | None = None,
    compile: bool | None = None,
) -> ReplayResult:
    """Run a trace's demands, and its look-ahead, through a tier of `budget_bytes`.

    `counting` is "exact" (what a live tier of this budget does; of a recorded one with the same
    policy and budget the very same counts) or "published" (see PublishedResidency; the default
    for traces that no tier recorded, as CSV, which has rates to be compared with). `compile`:
    whether the compiled twin counts, if it knows the policy; None: if the trace is long enough to
    be worth it.
    """
    counting = counting or ("exact" if trace.is_live else "published")
    if counting not in RESIDENCIES:
        raise ValueError(f"counting is {' or '.join(RESIDENCIES)}, not {counting!r}")
    space = trace.info.space(budget_bytes)
    check_capacity(space)
    if compile is None:
        compile = trace.num_routed >= compiled.WORTH_LOADING
    count = _compiled if compile and compiled.knows(policy, trace) else _plain
    counted = count(trace, policy, space, counting)
    stats, decode = counted.stats, counted.decode
    return ReplayResult(
        policy=policy if isinstance(policy, str) else policy.__module__,
        budget_bytes=budget_bytes,
        counting=counting,
        hits=stats.hits,
        misses=stats.misses,
        hit_pct_cum=100 * stats.hit_rate,
        hit_pct_decode=100 * decode.hit_rate,
        read_bytes=stats.bytes_read,
        decode_read_bytes=decode.bytes_read,
        prefetch_bytes=stats.bytes_prefetched,
        prefetches=stats.prefetches,
        prefetches_used=stats.prefetches_used,
        prefetches_wasted=stats.prefetches_wasted,
        evictions=stats.evictions,
        num_routed=trace.num_routed,
        num_tokens=counted.num_tokens,
        seconds=counted.seconds,
    )


class Counted(NamedTuple):
    """What a replay counts, the part of decode passes, and how many these were."""

    stats: TierStats
    decode: TierStats
    num_tokens: int
    seconds: float  # that it took


def _compiled(
    trace: Trace, policy: str | Callable[..., Policy], space: Space, counting: str
) -> Counted:
    assert isinstance(policy, str)
    compiled.prepare(trace.records)
    start = perf_counter()
    counts = compiled.run(trace.records, policy, space, counting == "published")
    return Counted(*counts, perf_counter() - start)


def _plain(
    trace: Trace, policy: str | Callable[..., Policy], space: Space, counting: str
) -> Counted:
    options: dict[str, Any] = {}
    if policy == "belady":
        options["future"] = [e.keys for e in trace.events if isinstance(e, Fetched)]
    residency = RESIDENCIES[counting](space, policies.create(policy, space, **options))
    start = perf_counter()
    decode, num_tokens = _run(residency, trace.events)
    return Counted(residency.stats, decode, num_tokens, perf_counter() - start)


def _run(residency: Residency, events: Sequence[Event]) -> tuple[TierStats, int]:
    """What happened in decode passes, and how many there were."""
    demand = residency.demand
    decode, num_tokens = TierStats(), 0
    before: TierStats | None = None  # at the start of the running decode pass
    last: Sequence[ExpertKey] = ()  # what the latest fetch asked for is not evicted for a guess
    for event in events:
        if isinstance(event, Fetched):
            last = event.keys
            demand(last, event.num_asked)
        elif isinstance(event, Pass):
            if before is not None:
                decode = decode + (residency.stats - before)
            before = None
            if event.phase == DECODE:
                before = residency.stats.copy()
                num_tokens += 1
        elif isinstance(event, Prefetched):
            for key in event.given_up:
                residency.cancel(key)
            residency.guess(event.keys, event.limit, last)
        elif isinstance(event, Dropped):
            residency.drop(event.key)
    if before is not None:
        decode = decode + (residency.stats - before)
    return decode, num_tokens
