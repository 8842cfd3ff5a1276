"""The chooser: on which side each missed expert runs, without regret.

Normally a layer's misses are split so that both sides end together. The static plans that other
programs follow run beside it in the shadow: their own bookkeeping, over the same routing, with the
costs that were measured here. A plan whose shadow is faster is used; what it really takes corrects
its shadow, so that a mistaken model is found out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from time import perf_counter

from tiered.experts import ExpertKey
from tiered.planning.costs import Costs, Miss
from tiered.planning.machine import Machine, Rates, num_launches
from tiered.planning.simulation import Simulation
from tiered.planning.sizes import ModelSizes
from tiered.planning.strategies import DYNAMIC, STATIC, Budgets, Strategy
from tiered.planning.synthetic import Routed


class Shadow:
    """A plan that is followed in bookkeeping only."""

    def __init__(self, simulation: Simulation) -> None:
        self.simulation = simulation
        self.seconds = 0.0  # per token, averaged over the latest
        self._tokens = 0

    def token(self, routed: Sequence[Sequence[int]], rates: Rates, memory: int) -> float:
        self.simulation.machine.rates = rates
        seconds = self.simulation.token(routed, 0)
        self._tokens = min(self._tokens + 1, memory)
        self.seconds += (seconds - self.seconds) / self._tokens
        return seconds

    def held(self) -> set[ExpertKey]:
        """What is in memory and would have to be read otherwise."""
        ram, vram = self.simulation.ram, self.simulation.gpu.residency
        if ram is None:
            return set()
        return {*ram.keys, *(vram.keys if vram else ())}


class Chooser:
    """Call `place` for each layer with experts, `layer_done` after it, and `token_done` at the end.

    `plan` is what to follow, and `target` (if it is a fixed plan) which experts should be on the
    GPU. Every `period` tokens the fastest plan is chosen; another one must be faster by `margin`.
    """

    def __init__(
        self,
        costs: Costs,
        model: ModelSizes,
        budgets: Budgets,
        plans: Sequence[Strategy] = (*DYNAMIC, *STATIC),
        *,
        policy: str,
        period: int = 24,
        memory: int = 96,
        margin: float = 0.02,
        clock: Callable[[], float] = perf_counter,
    ) -> None:
        self.costs = costs
        self.plan = plans[0]
        self.target: list[ExpertKey] = []
        self.num_switches = 0

        def shadow(plan: Strategy) -> Shadow:
            machine = Machine(Rates.learnt(costs, 1.0, 1e-12))
            return Shadow(
                Simulation(model, machine, budgets, plan, policy=policy, look_ahead=0, costs=costs)
            )

        self.shadows = {plan: shadow(plan) for plan in plans}
        # Does what is really done, also when plans change: what it takes longer than this is what
        # the model does not know.
        self._mirror = shadow(plans[0])
        self._correction: dict[Strategy, float] = {}  # measured / shadow
        self._period, self._memory, self._margin = period, memory, margin
        self._dense = sum(model.attention) + sum(model.shared) + model.head
        self._launches = num_launches(model)
        self._nbytes = max(model.experts)
        self._clock = clock
        self._start: float | None = None
        self._experts = 0.0  # seconds of this token's experts
        self._rest = 0.0  # seconds of a token beside its experts
        self._measured = self._shadowed = 0.0  # of the plan in use, since the last decision
        self._tokens = 0

    def warm(self, tokens: Sequence[Routed]) -> None:
        """Fill the shadows' tiers as the real ones were filled."""
        for shadow in (*self.shadows.values(), self._mirror):
            shadow.simulation.warm(tokens)

    def place(self, hits: float, misses: Sequence[Miss], wait: float = 0.0) -> int:
        """How many of the misses to copy: the first ones. See Costs.layer_seconds."""
        if self._start is None:
            self._start = self._clock()
        if self.plan.share is not None:
            return round(self.plan.share * len(misses))
        return self.costs.balance(hits, misses, wait)

    def layer_done(self, seconds: float) -> None:
        """A layer's experts took so long, from the router's choice to the sum."""
        self._experts += seconds

    def token_done(self, routed: Sequence[Sequence[int]]) -> None:
        """A token is finished, with these experts by layer."""
        if self._start is None:
            return
        now = self._clock()
        seconds, self._start = now - self._start, now
        rest = max(1e-9, seconds - self._experts)
        self._rest += (rest - self._rest) * (0.1 if self._rest else 1.0)
        self._experts = 0.0
        rates = Rates.learnt(self.costs, self._dense, self._rest, self._launches)
        for shadow in self.shadows.values():
            shadow.token(routed, rates, self._memory)
        self._tokens += 1
        self._measured += seconds
        self._shadowed += self._mirror.token(routed, rates, self._memory)
        if self._tokens >= self._period:
            self._decide()

    def _moving(self, plan: Strategy) -> float:
        """Seconds of reads and copies from what is really there to what the plan's shadow has.
        "popular" and "recent" go on from what is there."""
        shadow, mirror, seconds = self.shadows[plan], self._mirror, 0.0
        if plan.keep in ("always", "never"):
            seconds += len(shadow.held() - mirror.held()) * self.costs.disk(self._nbytes)
        if plan.keep == "never":
            wanted = set(shadow.simulation.on_gpu()).difference(mirror.simulation.on_gpu())
            seconds += len(wanted) * self.costs.link(self._nbytes)
        return seconds

    def _decide(self) -> None:
        now = self._measured / self._shadowed
        before = self._correction.get(self.plan, now)
        self._correction[self.plan] = 0.5 * (before + now)
        scores = {
            plan: shadow.seconds * self._correction.get(plan, 1.0)
            for plan, shadow in self.shadows.items()
        }
        now = scores[self.plan] * (1 - self._margin)
        for plan in scores:  # what has to be moved first counts against it
            scores[plan] += self._moving(plan) / self._memory
        best = min(scores, key=scores.__getitem__)
        if scores[best] < now:
            self.plan = best
            stays = best.cached and best.keep in ("never", "recent")
            self.target = self.shadows[best].simulation.on_gpu() if stays else []
            self._mirror.simulation.follow(self.plan, self.target)
            self.num_switches += 1
        elif self.target and self.plan.keep == "recent":  # it had the time to get there
            self.target = []
            self._mirror.simulation.follow(self.plan)
        for plan, value in self._correction.items():  # what was found out long ago may have changed
            if plan != self.plan:
                self._correction[plan] = value + 0.02 * (1.0 - value)
        self._measured = self._shadowed = 0.0
        self._tokens = 0
