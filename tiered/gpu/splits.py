"""How many of a layer's misses are copied to the GPU; the processor computes the rest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from tiered.governor import Allowance, Governor
from tiered.planning.costs import Costs, Miss

# Where misses are computed, in the order in which a governor tries them.
PLANS = "all on the processor", "half on the GPU", "balanced", "all on the GPU"
BALANCED = 2
NEAR = 1.25  # times what the balanced plan takes: more is not worth a try
MEMORY = 1000  # layers


class Split(Protocol):
    """Decides how many of a layer's misses are copied."""

    def place(self, hits: float, misses: Sequence[Miss], wait: float = 0.0) -> int:
        """The first so many misses. `hits`: bytes that are resident; `wait`: until the link is
        free, in seconds."""


class Balanced:
    """Copies so many misses that both sides end together: m * P / (P + C), with measured rates."""

    def __init__(self, costs: Costs) -> None:
        self._costs = costs

    def place(self, hits: float, misses: Sequence[Miss], wait: float = 0.0) -> int:
        return self._costs.balance(hits, misses, wait)


class Fixed:
    """Copies a fixed share of the misses: 1 is a GPU alone, 0 leaves every miss to the CPU."""

    def __init__(self, share: float) -> None:
        if not 0 <= share <= 1:
            raise ValueError(f"share must lie in 0 ... 1, not {share}")
        self._share = share

    def place(self, hits: float, misses: Sequence[Miss], wait: float = 0.0) -> int:
        return round(self._share * len(misses))


class Governed:
    """Balanced, unless a governor has measured that one of the plans that never change is quicker:
    costs may be wrong about a machine, the time of tokens is not.

    `choice` allows a number of PLANS. Costs are asked about all of them each time, so that a
    governor tries none that would be far slower: see `is_near`.
    """

    def __init__(self, costs: Costs) -> None:
        self._costs = costs
        self.choice: Allowance | None = None  # None: balanced
        self._seconds = [0.0] * len(PLANS)  # that costs foresee of each, lately

    def place(self, hits: float, misses: Sequence[Miss], wait: float = 0.0) -> int:
        ends = self._costs.ends(hits, misses, wait)
        copied = 0, round(0.5 * len(misses)), ends.index(min(ends)), len(misses)
        for plan, count in enumerate(copied):
            self._seconds[plan] += ends[count] - self._seconds[plan] / MEMORY
        return copied[self.choice.limit() if self.choice else BALANCED]

    def is_near(self, plan: int) -> bool:
        """Whether it would take little more than the balanced one, for all that costs tell."""
        return self._seconds[plan] <= NEAR * self._seconds[BALANCED]


def govern(splits: Sequence[Governed]) -> Governor:
    """Who measures the plans of these, of which each has the experts of a card's layers."""
    governor = Governor(
        range(len(PLANS)), "computing of misses", patience=4, margin=0.02, start=BALANCED,
        labels=PLANS, is_worth_trying=lambda plan: all(split.is_near(plan) for split in splits),
    )  # fmt: skip
    for split in splits:
        split.choice = governor
    return governor
