"""The bookkeeping of experts on a GPU: who is there, who is on the way, and who may come.

Unlike the RAM tier, it does not take in whatever is demanded: a miss can run on the CPU instead, so
a copy has to be worth it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence, Set

from tiered.cache.residency import Residency, TierStats
from tiered.experts import ExpertKey
from tiered.planning.admission import Admission
from tiered.planning.machine import Machine
from tiered.planning.strategies import Strategy
from tiered.policies import Evictable


class GpuTier:
    """Slots of VRAM on a simulated machine; None of them if `residency` is None."""

    def __init__(
        self, residency: Residency | None, admission: Admission, strategy: Strategy
    ) -> None:
        self.residency = residency
        self.admission = admission
        self.strategy = strategy
        self.target: frozenset[ExpertKey] = frozenset()  # what a fixed strategy is to have there
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
        """How many of these may be copied: the first ones, if all that is copied stays."""
        tier = self.residency
        if tier is None or below is None or self.strategy.keep != "always":
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
        """Give slots to experts that were copied; copy what the CPU computed and is worth it.

        `layer`: what a layer asked for; none of it is evicted. `below` is the RAM tier; None: all
        is there.
        """
        tier = self.residency
        keep = "never" if self.target else self.strategy.keep
        if tier is None:
            return
        batch = [key for key in layer if key in tier]
        for key in copied if keep != "never" else ():  # "always": `make_way` was asked before
            if self._make_room(tier, key, batch, below, is_there=True):
                batch.append(key)
        if batch:
            tier.lookup(batch)
        wanted = computed if self.strategy.promote else ()
        for key in [*copied, *computed] if keep == "never" and self.target else wanted:
            if machine.link_free > machine.now:  # the link has better things to do
                return
            if keep == "never":
                stay = {*self.target, *batch}
                victim = would_evict(tier, key, lambda other, stay=stay: other not in stay)  # type: ignore[misc]
                worth = key in self.target and key not in tier and victim is not None
            else:
                stay = set(batch)
                worth = self._make_room(tier, key, batch, below, is_there=False)
            if worth and tier.guess([key], 1, stay):
                nbytes = tier.space.blob_bytes[key.layer]
                self._arrival[key] = machine.copy(nbytes, machine.now)

    def _make_room(
        self,
        tier: Residency,
        key: ExpertKey,
        batch: Sequence[ExpertKey],
        below: Residency | None,
        is_there: bool,
    ) -> bool:
        """Whether `key` should be there. What would have to be read again leaves only for one that
        is worth a read; otherwise the next that is in RAM, too, makes room at once."""
        if key in tier or not tier.fits([*batch, key]):
            return False
        coming = sum(tier.space.nbytes(other) for other in (*batch, key) if other not in tier)
        has_room = tier.used + coming <= tier.space.capacity
        if has_room or (is_there and self.strategy.keep == "always"):
            return True
        victim = would_evict(tier, key, lambda other: other not in batch)
        if victim is not None and below is not None and victim not in below:
            if self.admission.worth_a_read(key, victim):
                return True
            spares = tier.resident() & below.resident()
            spares.difference_update(batch)
            victim = would_evict(tier, key, spares.__contains__) if spares else None
        if victim is None:
            return False
        worth = self.strategy.keep == "recent" or self.admission.worth(key, victim, is_there)
        if worth and below is not None:
            tier.drop(victim)
        return worth


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
