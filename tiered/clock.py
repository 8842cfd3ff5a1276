"""Where the time of a forward pass goes, part by part."""

from __future__ import annotations

from time import perf_counter


class PartClock:
    """Seconds by part. `lap(part)` gives `part` the time since the last lap or start."""

    def __init__(self, *parts: str) -> None:
        self.seconds = dict.fromkeys(parts, 0.0)
        self._last = perf_counter()

    def start(self) -> None:
        self._last = perf_counter()

    def lap(self, part: str) -> None:
        now = perf_counter()
        self.seconds[part] += now - self._last
        self._last = now
