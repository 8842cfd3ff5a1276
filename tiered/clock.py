"""Where the time of a forward pass goes, part by part."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from time import perf_counter


class PartClock:
    """Seconds by part. `lap(part)` gives `part` the time since the last lap or start, but for what
    `known()` says is another part's: seconds by part of what was put off, and done meanwhile."""

    def __init__(self, *parts: str, known: Callable[[], Mapping[str, float]] = dict) -> None:
        self.seconds = dict.fromkeys(parts, 0.0)
        self._known = known
        self._last = perf_counter()

    def start(self) -> None:
        self._last = perf_counter()

    def lap(self, part: str) -> None:
        now = perf_counter()
        self.seconds[part] += now - self._last
        self._last = now
        for other, seconds in self._known().items():
            self.seconds[other] += seconds
            self.seconds[part] -= seconds
