"""What a scheduler counted."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

BOUNDS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)  # seconds


class Histogram:
    """How many values were at most each bound."""

    def __init__(self, bounds: tuple[float, ...] = BOUNDS) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def add(self, value: float) -> None:
        at = sum(value > bound for bound in self.bounds)
        self.counts[at] += 1
        self.total += value


@dataclass
class Counts:
    """Totals since the scheduler was made; tokens are counted when they are computed."""

    finished: Counter[str] = field(default_factory=Counter)  # by reason
    prompt_tokens: int = 0
    cached_tokens: int = 0  # of prompts, not computed again
    new_tokens: int = 0
    drafted: int = 0  # tokens computed ahead, by speculation
    drafted_right: int = 0
    preemptions: int = 0
    steps: int = 0
    decode_rows: int = 0  # over all decode steps: / steps is the average batch
    decode_steps: int = 0
    busy_seconds: float = 0.0
    first_token_seconds: Histogram = field(default_factory=Histogram)
    request_seconds: Histogram = field(default_factory=Histogram)
