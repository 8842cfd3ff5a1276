"""The bookkeeping of experts on a GPU: who is there, who is on the way, and who may come.

Unlike the RAM tier, it does not take in whatever is demanded: a miss can run on the CPU instead, so
a copy has to be worth it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence, Set

from tiered.cache.residency import Residency, TierStats
from tiered.experts import ExpertKey
from tiered.governor import Allowance
from tiered.planning.admission import Admission
from tiered.planning.machine import Machine
from tiered.planning.strategies import Strategy
from tiered.policies import Evictable


class GpuTier:
    """Slots of VRAM on a simulated machine; None of them if `residency` is None. `promotion`:
    whether a strategy that promotes experts may do so now."""

    def __init__(
        self,
        residency: Residency | None,
        admission: Admission,
        strategy: Strategy,
        promotion: Allowance,
    ) -> None:
        self.residency = residency
        self.admission = admission
        self.strategy = strategy
        self._promotion = promotion
        self._arrival: dict[ExpertKey, float] = {}  # of experts on their way

    def __contains__(self, key: ExpertKey) -> bool:
        return self.residency is not None and key in self.residency

    def split(
        self, keys: Sequence[ExpertKey], now: float, patience: float
    ) -> tuple[set[ExpertKey], dict[ExpertKey, float]]:
        """What is there, and what arrives within `patience` seconds (and when)."""
        hits: set[ExpertKey] = set()
        awaited: dict[ExpertKey, float] = {}
        if self.residency is None:
            return hits, awaited
        for key in keys:
            if key in self.residency:
                arrival = self._arrival.get(key, 0.0)
                if arrival <= now:
                    hits.add(key)
                    self._arrival.pop(key, None)
                elif arrival <= now + patience:
                    awaited[key] = arrival
        return hits, awaited

    def most_copied(
        self,
        layer: Sequence[ExpertKey],
        copied: Sequence[ExpertKey],
        below: Residency | None,
    ) -> int:
        """How many of these may be copied: the first ones, if what is copied stays."""
        tier = self.residency
        if tier is None or below is None or not self.strategy.keep:
            return len(copied)
        return make_way(
            tier, copied, layer, below.resident(), lambda: tier.resident() & below.resident()
        )

    def keep(
        self,
        layer: Sequence[ExpertKey],
        copied: Sequence[ExpertKey],
        computed: Sequence[ExpertKey],
        machine: Machine,
        below: Residency | None,
    ) -> None:
        """Give slots to experts that were copied, for which `most_copied` was asked before; copy
        what the CPU computed and is worth it.

        `layer`: what a layer asked for; none of it is evicted. `below` is the RAM tier; None: all
        is there.
        """
        tier = self.residency
        if tier is None:
            return
        used = [key for key in layer if key in tier]
        for key in copied if self.strategy.keep else ():
            if tier.fits([*used, key]):
                used.append(key)
        if used:
            tier.lookup(used)
        if self.strategy.promote and self._promotion.limit():
            self._promote(tier, computed, used, machine, below)

    def _promote(
        self,
        tier: Residency,
        computed: Sequence[ExpertKey],
        used: Sequence[ExpertKey],
        machine: Machine,
        below: Residency | None,
    ) -> None:
        in_ram = None if below is None else below.resident()
        for key in computed:
            if machine.link_free > machine.now:  # the link has better things to do
                return
            staying = staying_for(tier, key, used, in_ram, self.admission)
            if staying is not None and tier.guess([key], 1, {*used, *staying}):
                nbytes = tier.space.blob_bytes[key.layer]
                self._arrival[key] = machine.copy(nbytes, machine.now)


def staying_for(
    tier: Residency,
    key: ExpertKey,
    used: Collection[ExpertKey],
    below: Set[ExpertKey] | None,
    admission: Admission,
) -> Collection[ExpertKey] | None:
    """Who must not leave for a copy of `key` that nobody waits for, beside what is `used`; None:
    nobody should.

    What is in no memory `below` (None: all is there) leaves only for one that is worth a read;
    otherwise it stays, and the next that is there, too, may have to go.
    """
    if tier.used + tier.space.nbytes(key) <= tier.space.capacity:
        return ()
    victim, staying = would_evict(tier, key, lambda other: other not in used), set[ExpertKey]()
    if victim is not None and below is not None and victim not in below:
        if admission.worth_a_read(key, victim):
            return staying
        spares = (tier.resident() & below).difference(used)
        victim = would_evict(tier, key, spares.__contains__) if spares else None
        staying = tier.resident() - spares
    return staying if victim is not None and admission.worth(key, victim) else None


def make_way(
    tier: Residency,
    wanted: Sequence[ExpertKey],
    staying: Collection[ExpertKey],
    below: Collection[ExpertKey],
    find_spares: Callable[[], Set[ExpertKey]],
) -> int:
    """How many of `wanted` may come at once, the first ones. What leaves for them is dropped: never
    `staying`, nor what is in no memory `below` and would have to be read again.

    `find_spares` tells what was lately in both memories.
    """
    left = tier.space.capacity - tier.used
    for count, key in enumerate(wanted):
        left -= tier.space.nbytes(key)
        while left < 0:
            victim = _spare_victim(tier, key, staying, below, find_spares)
            if victim is None:
                return count
            tier.drop(victim)
            tier.stats.evictions += 1
            left += tier.space.nbytes(victim)
    return len(wanted)


def _spare_victim(
    tier: Residency,
    key: ExpertKey,
    staying: Collection[ExpertKey],
    below: Collection[ExpertKey],
    find_spares: Callable[[], Set[ExpertKey]],
) -> ExpertKey | None:
    victim = would_evict(tier, key, lambda other: other not in staying)
    if victim is None or victim in below or not (spares := find_spares()):
        return victim if victim in below else None
    return would_evict(
        tier, key, lambda other: other in spares and other in below and other not in staying
    )


def would_evict(tier: Residency, key: ExpertKey, evictable: Evictable) -> ExpertKey | None:
    """Which expert would make room for `key`."""
    victim_for = getattr(tier.policy, "victim_for", None)
    if victim_for is None:
        return tier.policy.victim(evictable)
    victim: ExpertKey | None = victim_for(key, evictable)
    return victim


def fill(tier: Residency, keys: Sequence[ExpertKey]) -> None:
    """Load as many of these experts as fit; the first ones will stay longest. Counts start then."""
    left, fitting = tier.space.capacity - tier.used, []
    for key in keys:
        left -= tier.space.nbytes(key)
        if left < 0:
            break
        fitting.append(key)
    for key in reversed(fitting):
        tier.lookup([key])
    tier.stats = TierStats()
