"""Costs: what computing and moving experts takes, learnt while it happens; and where misses run.

Nothing here is a constant of some machine. Every cost is an average of what was measured lately,
also of what the processor loses while copies read the same memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from time import perf_counter
from typing import NamedTuple

Share = float | None  # of a layer's misses that are copied; None: so that both sides end together
BALANCE: Share = None


class Miss(NamedTuple):
    """An expert that a layer needs and the GPU does not have."""

    nbytes: float
    ready: float = 0.0  # seconds until it is in RAM: 0, or what the disk takes


class Line:
    """seconds = fixed + per_byte * nbytes, fitted to what was observed; older counts less.

    Starts from a guess that weighs as much as one observation of `nbytes`.
    """

    def __init__(self, fixed: float, per_byte: float, nbytes: float, memory: int = 64) -> None:
        self.fixed, self.per_byte = fixed, per_byte
        self._keep = 1 - 1 / memory
        self._n, self._x, self._y, self._xx, self._xy = 0.0, 0.0, 0.0, 0.0, 0.0
        self._add(nbytes, fixed + per_byte * nbytes)

    def __call__(self, nbytes: float) -> float:
        return self.fixed + self.per_byte * nbytes

    def observe(self, nbytes: float, seconds: float) -> None:
        self._add(nbytes, seconds)
        mean_x, mean_y = self._x / self._n, self._y / self._n
        variance = self._xx / self._n - mean_x**2
        slope = 0.0
        if variance > (0.1 * mean_x) ** 2:  # sizes differ enough to tell both numbers
            slope = (self._xy / self._n - mean_x * mean_y) / variance
        if 0 < slope * mean_x <= mean_y:
            self.fixed, self.per_byte = mean_y - slope * mean_x, slope
        else:
            self.fixed = min(self.fixed, 0.5 * mean_y)
            self.per_byte = (mean_y - self.fixed) / mean_x

    def _add(self, nbytes: float, seconds: float) -> None:
        self._n = self._n * self._keep + 1
        self._x = self._x * self._keep + nbytes
        self._y = self._y * self._keep + seconds
        self._xx = self._xx * self._keep + nbytes**2
        self._xy = self._xy * self._keep + nbytes * seconds


class Costs:
    """Seconds of each way to get an expert computed, by bytes of weights.

    `gpu` computes what is resident, `cpu` what is in RAM, `link` copies RAM to the GPU, `disk`
    reads into RAM. `slowdown` is how much longer the CPU takes while copies run.
    """

    def __init__(self, gpu: Line, cpu: Line, link: Line, disk: Line, slowdown: float = 1.0) -> None:
        self.gpu, self.cpu, self.link, self.disk = gpu, cpu, link, disk
        self.slowdown = slowdown

    @classmethod
    def unknown(cls, nbytes: float) -> Costs:
        """Before anything was measured: the order of magnitude of any machine."""
        return cls(
            Line(1e-5, 1 / 300e9, nbytes),
            Line(2e-5, 1 / 40e9, nbytes),
            Line(1e-5, 1 / 15e9, nbytes),
            Line(1e-4, 1 / 3e9, nbytes),
        )

    def observe_cpu(self, nbytes: float, seconds: float, overlap: float) -> None:
        """The CPU computed; `overlap` is the share of that time (0 to 1) in which copies ran."""
        if overlap < 0.1:
            self.cpu.observe(nbytes, seconds)
            return
        alone = self.cpu(nbytes)
        measured = max(1.0, 1 + (seconds / alone - 1) / overlap)
        self.slowdown += 0.1 * (measured - self.slowdown)
        rest = (1 - overlap) + overlap * self.slowdown  # what of it is news about the CPU itself
        self.cpu.observe(nbytes, seconds / rest)

    def cpu_seconds(self, nbytes: float, copying: float) -> float:
        """Of the CPU for `nbytes`, while copies run for the first `copying` seconds."""
        alone = self.cpu(nbytes)
        if copying >= alone * self.slowdown:
            return alone * self.slowdown
        return alone + copying * (1 - 1 / self.slowdown)

    def layer_seconds(
        self, hits: float, misses: Sequence[Miss], copied: int, wait: float = 0.0
    ) -> float:
        """Of a layer's experts, if the first `copied` misses are copied, the rest on the CPU.

        `hits` are bytes that are resident; the link is busy for the next `wait` seconds. Misses
        are in the order in which they are in RAM.
        """
        gpu = self.gpu(hits) if hits else 0.0
        if not misses:
            return gpu
        arrival = wait
        for nbytes, ready in misses[:copied]:
            arrival = max(arrival, ready) + self.link(nbytes)
            gpu = max(gpu, arrival) + self.gpu(nbytes)
        if copied == len(misses):
            return gpu
        left = sum(miss.nbytes for miss in misses[copied:])
        last = misses[-1]
        return max(
            gpu,
            self.cpu_seconds(left, arrival),
            last.ready + self.cpu(last.nbytes) if last.ready else 0.0,
        )

    def balance(self, hits: float, misses: Sequence[Miss], wait: float = 0.0) -> int:
        """How many of the misses to copy, so that the layer ends soonest."""
        ends = [self.layer_seconds(hits, misses, n, wait) for n in range(len(misses) + 1)]
        return ends.index(min(ends))


class Chooser:
    """Decides, layer by layer, how many misses are copied to the GPU; the rest runs on the CPU.

    Normally the split by which both sides end together. Static shares of copies are followed in
    the shadow: what they would have taken is estimated for every layer. Every `period` tokens the
    one that could be best is tried for `trial` tokens, and used as long as its measured time, in
    units of the estimate for the same layers, is better by `margin`. Trials become rarer while
    they change nothing. Call `place` for each layer and `token_done` after each token.
    """

    def __init__(
        self,
        costs: Costs,
        static: Sequence[float] = (0.0, 0.5, 1.0),
        *,
        period: int = 48,
        trial: int = 6,
        margin: float = 0.02,
        clock: Callable[[], float] = perf_counter,
    ) -> None:
        self.costs = costs
        self.plan: Share = BALANCE  # what is used
        self.trying: Share = BALANCE  # what is used just now; another than `plan` in a trial
        self.num_switches = 0
        self._plans: list[Share] = [BALANCE, *static]
        self._period, self._trial, self._margin, self._clock = period, trial, margin, clock
        self._ratio: dict[Share, float] = {}  # measured / estimated for balance
        self._shadow = dict.fromkeys(self._plans, 0.0)  # estimates since the last decision
        self._tried: dict[Share, int] = dict.fromkeys(self._plans, 0)
        self._rest = 0.0  # seconds of a token outside its experts
        self._estimate = self._used = 0.0  # of this token: for balance, and for what was done
        self._measured = self._expected = 0.0  # since the plan in use changed
        self._tokens = 0
        self._patience = 1
        self._start: float | None = None

    def place(self, hits: float, misses: Sequence[Miss], wait: float = 0.0) -> int:
        """How many of the misses to copy: the first ones. See Costs.layer_seconds."""
        if self._start is None:
            self._start = self._clock()
        costs, num = self.costs, len(misses)
        if not num:
            seconds = costs.layer_seconds(hits, misses, 0, wait)
            for plan in self._plans:
                self._shadow[plan] += seconds
            self._estimate += seconds
            self._used += seconds
            return 0
        ends = [costs.layer_seconds(hits, misses, n, wait) for n in range(num + 1)]
        best = ends.index(min(ends))
        for plan in self._plans:
            self._shadow[plan] += ends[best if plan is None else round(plan * num)]
        chosen = best if self.trying is None else round(self.trying * num)
        self._estimate += ends[best]
        self._used += ends[chosen]
        return chosen

    def token_done(self) -> None:
        """A token is finished: compare what it took, and decide about the next."""
        if self._start is None:
            return
        now = self._clock()
        seconds, self._start = now - self._start, now
        if self._rest == 0.0:
            self._rest = max(0.0, seconds - self._used)
        self._measured += seconds
        self._expected += self._rest + self._estimate
        if self.trying == self.plan:
            self._rest += 0.1 * (max(0.0, seconds - self._used) - self._rest)
        self._estimate = self._used = 0.0
        self._tokens += 1
        if self.trying != self.plan:
            hopeless = self._tokens >= 2 and self._current() > 1.5 * self._ratio[self.plan]
            if self._tokens >= self._trial or hopeless:
                self._end_trial()
        elif self._tokens >= self._period * self._patience:
            self._ratio[self.plan] = self._current()
            self._begin(self._candidate())

    def _current(self) -> float:
        return self._measured / self._expected if self._expected else 1.0

    def _candidate(self) -> Share:
        """The plan that could be best; those whose estimates are hopeless are not tried.

        How far an estimate is trusted depends on how well it did for the plan in use.
        """
        error = abs(self._ratio[self.plan] - 1)
        limit = self._shadow[BALANCE] * (1 + max(0.1, 3 * error))
        limit += error * self._rest * self._tokens
        others = [plan for plan in self._plans if plan != self.plan and self._shadow[plan] <= limit]
        if not others:
            return self.plan
        return min(others, key=lambda plan: (self._tried[plan], self._shadow[plan]))

    def _end_trial(self) -> None:
        self._ratio[self.trying] = self._current()
        self._tried[self.trying] += 1
        if self._ratio[self.trying] < self._ratio[self.plan] * (1 - self._margin):
            self.plan = self.trying
            self.num_switches += 1
            self._patience = 1
        else:
            self._patience = min(2 * self._patience, 16)
        self._begin(self.plan)

    def _begin(self, plan: Share) -> None:
        self.trying = plan
        self._measured = self._expected = 0.0
        self._tokens = 0
        self._shadow = dict.fromkeys(self._plans, 0.0)
