"""The bookkeeping of experts on a GPU: who is there, who is on the way, and who may come.

Unlike the RAM tier, it does not take in whatever is demanded: a miss can run on the CPU instead, so
a copy has to be worth it.
"""

from __future__ import annotations

from collections.abc import Sequence

from tiered.admission import Admission
from tiered.experts import ExpertKey
from tiered.machine import Machine
from tiered.policies import Evictable
from tiered.residency import Residency, TierStats
from tiered.strategies import Strategy


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
        if self.residency is None:
            return set(), {}
        resident = [key for key in keys if key in self.residency]
        self.residency.lookup(resident)
        hits, awaited = set(resident), {}
        for key in resident:
            arrival = self._arrival.get(key, 0.0)
            if arrival > now:
                hits.discard(key)
                if arrival <= now + patience:
                    awaited[key] = arrival
            elif arrival:
                del self._arrival[key]
        return hits, awaited

    def keep(
        self,
        layer: Sequence[ExpertKey],
        copied: Sequence[ExpertKey],
        computed: Sequence[ExpertKey],
        machine: Machine,
        below: Residency | None,
    ) -> None:
        """Give slots to experts that were copied; copy what the CPU computed and is worth it.

        Nothing of the same layer is evicted for them. `below` is the RAM tier; None: all is there.
        """
        tier = self.residency
        if tier is None:
            return
        if self.strategy.keep == "never":
            self._approach(tier, layer, [*copied, *computed], machine)
            return
        for key in copied:
            self._admit(tier, key, layer, below, is_there=True)
        for key in computed if self.strategy.promote else ():
            if machine.link_free > machine.now:  # the link has better things to do
                return
            if self._admit(tier, key, layer, below, is_there=False):
                nbytes = tier.space.blob_bytes[key.layer]
                self._arrival[key] = machine.copy(nbytes, machine.now)

    def _approach(
        self,
        tier: Residency,
        layer: Sequence[ExpertKey],
        missed: Sequence[ExpertKey],
        machine: Machine,
    ) -> None:
        """Copy what should be there, as soon as it is missed."""
        for key in missed:
            if machine.link_free > machine.now:
                return
            if key not in self.target or key in tier:
                continue
            stay = {*self.target, *(other for other in layer if other in tier)}
            victim = would_evict(tier, key, lambda other, stay=stay: other not in stay)  # type: ignore[misc]
            if victim is not None and tier.fits(
                [*(other for other in layer if other in tier), key]
            ):
                tier.lookup([key], stay)
                self._arrival[key] = machine.copy(tier.space.blob_bytes[key.layer], machine.now)

    def _admit(
        self,
        tier: Residency,
        key: ExpertKey,
        layer: Sequence[ExpertKey],
        below: Residency | None,
        is_there: bool,
    ) -> bool:
        others = [other for other in layer if other in tier]
        if key in tier or not tier.fits([*others, key]):
            return False
        has_room = tier.used + tier.space.blob_bytes[key.layer] <= tier.space.capacity
        if not has_room and self.strategy.keep != "always":
            victim = would_evict(tier, key, lambda other: other not in layer)
            if victim is None:
                return False
            stays = below is None or victim in below
            if not stays:
                worth = self.admission.worth_a_read(key, victim)
            else:
                recent = self.strategy.keep == "recent"
                worth = recent or self.admission.worth(key, victim, is_there)
            if not worth:
                return False
        tier.lookup([key], others)
        return True


def would_evict(tier: Residency, key: ExpertKey, evictable: Evictable) -> ExpertKey | None:
    """Which expert would make room for `key`."""
    victim_for = getattr(tier.policy, "victim_for", None)
    if victim_for is None:
        return tier.policy.victim(evictable)
    victim: ExpertKey | None = victim_for(key, evictable)
    return victim


def fill(tier: Residency, keys: Sequence[ExpertKey]) -> None:
    """Load experts until the tier is full; its counts start afterwards."""
    for key in keys:
        if tier.used + tier.space.blob_bytes[key.layer] > tier.space.capacity:
            break
        tier.lookup([key])
    tier.stats = TierStats()
