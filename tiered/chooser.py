"""The chooser: on which side each missed expert runs, without regret.

The cost model proposes; measurement disposes. Normally misses are split so that both sides end
together. But a model can be wrong, so static plans are tried now and then, and whichever took the
least time per token is used.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from time import perf_counter

from tiered.costs import Costs, Miss
from tiered.strategies import STATIC, STRATEGIES, Strategy

HOPELESS = 2.0  # times the balanced estimate: such a plan is not tried
CLOSE = 1.1  # times the best plan's measured time: such a plan is tried more often


class Chooser:
    """Call `place` for each layer and `token_done` after each token; `plan` is what to follow.

    Each plan is first tried for `trial` tokens, then the best is used. Every `period` tokens
    another one is tried again, less and less often while that changes nothing. A plan replaces the
    one in use if its time is shorter by `margin`. A trial that goes badly ends at once.
    """

    def __init__(
        self,
        costs: Costs,
        plans: Sequence[Strategy] = (STRATEGIES["tiered"], *STATIC),
        *,
        period: int = 96,
        trial: int = 12,
        settle: int = 4,
        margin: float = 0.01,
        clock: Callable[[], float] = perf_counter,
    ) -> None:
        self.costs = costs
        self.plan = self._best = plans[0]
        self.num_switches = 0
        self._plans = list(plans)
        self._period, self._trial, self._settle = period, trial, settle
        self._margin, self._clock = margin, clock
        self._seconds: dict[Strategy, float] = {}  # per token, as measured
        self._shadow = dict.fromkeys(plans, 0.0)  # what each would take by the cost model
        self._untried = list(plans[1:])
        self._num_tried = dict.fromkeys(plans, 0)
        self._window: list[float] = []  # seconds of the tokens since the plan changed
        self._patience = 1
        self._start: float | None = None

    def place(self, hits: float, misses: Sequence[Miss], wait: float = 0.0) -> int:
        """How many of the misses to copy: the first ones. See Costs.layer_seconds."""
        if self._start is None:
            self._start = self._clock()
        num = len(misses)
        if not num:
            return 0
        ends = [self.costs.layer_seconds(hits, misses, n, wait) for n in range(num + 1)]
        best = ends.index(min(ends))
        for plan in self._plans:
            self._shadow[plan] += ends[best if plan.share is None else round(plan.share * num)]
        return best if self.plan.share is None else round(self.plan.share * num)

    def token_done(self) -> None:
        """A token is finished: measure it, and decide about the next."""
        if self._start is None:
            return
        now = self._clock()
        self._window.append(now - self._start)
        self._start = now
        if self.plan != self._best:
            self._judge_trial()
        elif len(self._window) >= self._settle + self._trial:
            self._seconds[self.plan] = self._mean()
            if self._untried or len(self._window) >= self._period * self._patience:
                self._follow(self._next())

    def _mean(self) -> float:
        measured = self._window[self._settle :][-4 * self._trial :]
        return sum(measured) / len(measured)

    def _judge_trial(self) -> None:
        measured = self._window[self._settle :]
        reference = self._seconds[self._best]
        lost = sum(self._window) - len(self._window) * reference
        gives_up = lost > 0.25 * self._trial * reference
        if len(measured) < self._trial and not gives_up:
            return
        seconds = self._mean() if measured else max(self._window)
        before = self._seconds.get(self.plan, seconds)
        self._seconds[self.plan] = seconds if gives_up else 0.5 * (before + seconds)
        self._num_tried[self.plan] += 1
        if self._seconds[self.plan] < reference * (1 - self._margin):
            self._best = self.plan
            self.num_switches += 1
            self._patience = 1
        elif not self._untried:
            self._patience = min(2 * self._patience, 16)
        self._follow(self._best)

    def _next(self) -> Strategy:
        """The plan to try now: one that was not tried yet, or one that was close."""
        limit = HOPELESS * min(self._shadow.values())
        while self._untried:
            plan = self._untried.pop(0)
            if self._shadow[plan] <= limit:
                return plan
        close = CLOSE * self._seconds[self._best]
        others = [
            plan
            for plan in self._plans
            if plan != self._best
            and self._shadow[plan] <= limit
            and self._seconds.get(plan, 0.0) <= close
        ]
        return min(others, key=self._num_tried.__getitem__, default=self._best)

    def _follow(self, plan: Strategy) -> None:
        self.plan = plan
        self._window = []
        self._shadow = dict.fromkeys(self._plans, 0.0)
