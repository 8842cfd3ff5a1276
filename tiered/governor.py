"""Governors: look-ahead, promotion, parallel reads and speculation, as far as they make tokens come
faster.

Guesses cost bandwidth and help only if the time they save demand is more than the time they cost
it; copies to a GPU take memory bandwidth from the processor; reads side by side may get in each
other's way. Which is true depends on disk, model and budget. So it is measured while running: most
tokens are made with the setting that is believed best, and now and then a short probe uses another.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from statistics import median
from typing import Protocol

log = logging.getLogger("tiered")


class Allowance(Protocol):
    def limit(self) -> int:
        """How much of something is allowed now; 0: it is off."""


class Always:
    """No limit."""

    def limit(self) -> int:
        return 1 << 30


def median_step(seconds: Sequence[float], counts: Sequence[int]) -> float:
    """Steps are alike, but for the first, which still adapts."""
    return median(seconds[1:] or seconds)


def depths(most: int) -> list[int]:
    """How many reads may go side by side: 1, ..., half of `most`, `most`."""
    return sorted({most >> halvings for halvings in range(most.bit_length())})


class Governor:
    """Chooses one of several limits of something, from the time that steps take with each.

    `limits` rise; it begins with the last, or number `start` of them. 0 is off, unless there are
    `labels` for what the limits mean. One is tried only if `is_worth_trying` says so. `add` each
    step (a token): they are counted in windows of `window`. After `patience` windows with the
    chosen limit, one window probes the next one below or above it, and is compared with the window
    before. Hysteresis: the other limit has to be faster by more than `margin` twice in a row; each
    probe that changes nothing doubles the patience, up to `max_patience`. `typical` makes a token's
    time of a window's steps: their seconds, and how many tokens each made.
    """

    def __init__(
        self,
        limits: Sequence[int],
        name: str = "look-ahead",
        window: int = 16,
        margin: float = 0.03,
        patience: int = 1,
        max_patience: int = 32,
        typical: Callable[[Sequence[float], Sequence[int]], float] = median_step,
        start: int = -1,
        labels: Sequence[str] = (),
        is_worth_trying: Callable[[int], bool] = lambda limit: True,
    ) -> None:
        self.limits = tuple(limits)
        self.name = name
        self.window = window
        self.margin = margin
        self.max_patience = max_patience
        self.benefit = 0.0  # last measured: share of a step's time that the higher limit saves
        self._typical = typical
        self._chosen = self._used = range(len(self.limits))[start]  # places in `limits`
        self.labels = tuple(labels)
        self._is_worth_trying = is_worth_trying
        self._direction = -1  # of the next probe
        self._seconds: list[float] = []  # of the steps in this window
        self._counts: list[int] = []  # of their tokens
        self._windows = 0  # since the last probe
        self._patience = patience
        self._before = 0.0  # a typical step with the chosen limit
        self._wins = 0  # probes in a row that were faster

    @property
    def chosen(self) -> int:
        """The limit that is believed best."""
        return self.limits[self._chosen]

    def label(self, limit: int) -> str:
        """What a limit is called."""
        return self.labels[self.limits.index(limit)] if self.labels else str(limit)

    @property
    def is_probing(self) -> bool:
        return self._used != self._chosen

    def limit(self) -> int:
        """See Allowance."""
        return self.limits[self._used]

    def add(self, seconds: float, count: int = 1) -> bool:
        """A step is over that made `count` tokens. Whether a comparison ended with it, and none
        has to be repeated first."""
        self._seconds.append(seconds)
        self._counts.append(count)
        if len(self._seconds) < self.window:
            return False
        typical = self._typical(self._seconds, self._counts)
        self._seconds.clear()
        self._counts.clear()
        if self.is_probing:
            self._compare(typical)
            return self._wins == 0
        self._before = typical
        self._windows += 1
        if self._windows >= self._patience:
            return not self._probe()
        return False

    def _probe(self) -> bool:
        """Begin to use the next limit below or above the chosen one that may be worth it."""
        for direction in (self._direction, -self._direction):
            others = range(len(self.limits))[self._chosen :: direction][1:]
            worth = [other for other in others if self._is_worth_trying(self.limits[other])]
            if worth:
                self._direction, self._used = direction, worth[0]
                return True
        self._windows = 0
        return False

    def _compare(self, probed: float) -> None:
        other, self._used, self._windows = self._used, self._chosen, 0
        saved = (self._before - probed) / max(self._before, 1e-9)
        higher, lower = (self._before, probed) if other < self._chosen else (probed, self._before)
        self.benefit = (lower - higher) / max(lower, 1e-9)
        if saved <= self.margin:
            self._wins = 0
            self._patience = min(2 * self._patience, self.max_patience)
            self._direction = -self._direction
            return
        self._wins += 1
        self._patience = 1
        if self._wins == 2:
            self._wins = 0
            left, self._chosen, self._used = self.chosen, other, other
            self._tell(left, self._before, probed)

    def _tell(self, left: int, before: float, now: float) -> None:
        setting, other = self.label(self.chosen), f"with {self.label(left)}"
        if left == 0 and not self.labels:
            setting, other = "on", "without"
        elif self.chosen == 0 and not self.labels:
            setting, other, before, now = "off", "without", now, before
        log.info(
            "%s is now %s: a token takes %.1f ms with it and %.1f ms %s",
            self.name, setting, 1e3 * now, 1e3 * before, other,
        )  # fmt: skip


class Governors:
    """Several, which take turns: while one compares, the others leave their limits as they are.

    Put `begin` and `end` around each step (a token).
    """

    def __init__(
        self, governors: Sequence[Governor], clock: Callable[[], float] = time.perf_counter
    ) -> None:
        # One that has a single limit has nothing to compare.
        self._governors = tuple(g for g in governors if len(g.limits) > 1)
        self._turn = 0
        self._clock = clock
        self._began = 0.0

    def __iter__(self) -> Iterator[Governor]:
        return iter(self._governors)

    def begin(self) -> None:
        self._began = self._clock()

    def end(self) -> None:
        if self._governors:
            ended = self._governors[self._turn].add(self._clock() - self._began)
            self._turn = (self._turn + ended) % len(self._governors)
