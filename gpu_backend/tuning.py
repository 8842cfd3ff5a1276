"""How kernels divide their work on one card. Changes speed, never a result."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from itertools import product
from pathlib import Path


@dataclass(frozen=True)
class Tuning:
    """Powers of two. `tiered calibrate` finds good ones and stores them by the card's name."""

    rows: int = 16  # features of one program in decode
    warps: int = 4
    prefill_rows: int = 16  # from as many rows of activations on, matrix products
    tile_tokens: int = 16
    tile_rows: int = 32
    copy_width: int = 1024  # bytes that one program rearranges

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value < 1 or value & (value - 1):
                raise ValueError(f"{field.name} must be a power of two, not {value}")
        if self.tile_tokens < 16:
            raise ValueError(f"tile_tokens must be at least 16, not {self.tile_tokens}")


DECODE = {"rows": (4, 8, 16, 32, 64), "warps": (1, 2, 4, 8)}
PREFILL = {"tile_tokens": (16, 32, 64), "tile_rows": (16, 32, 64, 128)}


def find_tuning(
    decode: Callable[[Tuning], float], prefill: Callable[[Tuning], float], start: Tuning
) -> Tuning:
    """The quickest way to divide the work, by the seconds that both kinds of product take.

    What a card cannot run (RuntimeError: its registers or shared memory do not suffice) is left
    out. `start` stays where nothing is quicker.
    """
    best = start
    for seconds_of, choices in ((decode, DECODE), (prefill, PREFILL)):
        names = list(choices)
        least = seconds_of(best)
        for values in product(*choices.values()):
            tried = replace(best, **dict(zip(names, values, strict=True)))
            with suppress(RuntimeError):
                seconds = seconds_of(tried)
                if seconds < least:
                    best, least = tried, seconds
    return best


def load_tuning(file: Path, card: str) -> Tuning:
    """What was stored for a card; the defaults if nothing was, or nothing that is usable."""
    try:
        return Tuning(**json.loads(file.read_text())[card])
    except (OSError, KeyError, TypeError, ValueError):
        return Tuning()


def save_tuning(file: Path, card: str, tuning: Tuning) -> None:
    """Add to, or replace in, a file of several cards."""
    try:
        known = json.loads(file.read_text())
    except (OSError, ValueError):
        known = {}
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({**known, card: asdict(tuning)}, indent=2) + "\n")
