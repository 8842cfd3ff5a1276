"""Governor: look-ahead, or speculation, stays on only while it makes tokens come faster.

Guesses cost bandwidth and help only if the time they save demand is more than the time they cost
it; which is true depends on disk, model and budget. So it is measured while running: most tokens
are made with the setting that is believed better, and now and then a short probe uses the other.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from statistics import median

log = logging.getLogger("tiered")


def median_step(seconds: Sequence[float], counts: Sequence[int]) -> float:
    """Steps are alike, but for the first, which still adapts."""
    return median(seconds[1:] or seconds)


class Governor:
    """Decides whether something (look-ahead) is on, from the time that steps take either way.

    Put `begin` and `end` around each step (a token), or `add` it. Steps are counted in windows of
    `window`. A probe window of the other setting follows `patience` windows of the chosen one, and
    is compared with the one before it. Hysteresis: the other setting has to be faster by more than
    `margin` twice in a row; each probe that changes nothing doubles the patience, up to
    `max_patience`. `typical` makes a token's time of a window's steps: their seconds, and how many
    tokens each made.
    """

    def __init__(
        self,
        on_limit: int,
        name: str = "look-ahead",
        window: int = 16,
        margin: float = 0.03,
        max_patience: int = 32,
        clock: Callable[[], float] = time.perf_counter,
        typical: Callable[[Sequence[float], Sequence[int]], float] = median_step,
    ) -> None:
        self.name = name
        self.window = window
        self.margin = margin
        self.max_patience = max_patience
        self.chosen = True  # believed better: on
        self.benefit = 0.0  # last measured: share of a step's time that being on saves
        self._on_limit = on_limit
        self._clock = clock
        self._began = 0.0
        self._typical = typical
        self._seconds: list[float] = []  # of the steps in this window
        self._counts: list[int] = []  # of their tokens
        self._windows = 0  # since the last probe
        self._patience = 1
        self._before = 0.0  # a typical step with the chosen setting
        self._probing = False
        self._wins = 0  # probes in a row that were faster

    @property
    def on(self) -> bool:
        return self.chosen != self._probing

    def limit(self) -> int:
        """The allowance that a Prefetcher asks for."""
        return self._on_limit if self.on else 0

    def begin(self) -> None:
        self._began = self._clock()

    def end(self) -> None:
        self.add(self._clock() - self._began)

    def add(self, seconds: float, count: int = 1) -> None:
        """A step is over that made `count` tokens."""
        self._seconds.append(seconds)
        self._counts.append(count)
        if len(self._seconds) >= self.window:
            typical = self._typical(self._seconds, self._counts)
            self._seconds.clear()
            self._counts.clear()
            if self._probing:
                self._compare(typical)
            else:
                self._before = typical
                self._windows += 1
                self._probing = self._windows >= self._patience

    def _compare(self, probed: float) -> None:
        self._probing = False
        self._windows = 0
        saved = (self._before - probed) / max(self._before, 1e-9)
        with_it, without = (self._before, probed) if self.chosen else (probed, self._before)
        self.benefit = (without - with_it) / max(without, 1e-9)
        if saved <= self.margin:
            self._wins = 0
            self._patience = min(2 * self._patience, self.max_patience)
            return
        self._wins += 1
        self._patience = 1
        if self._wins < 2:
            return
        self._wins = 0
        self.chosen = not self.chosen
        log.info(
            "%s is now %s: a token takes %.1f ms with it and %.1f ms without",
            self.name,
            "on" if self.chosen else "off",
            1e3 * with_it,
            1e3 * without,
        )
