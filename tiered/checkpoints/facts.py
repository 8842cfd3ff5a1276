"""Facts: typed look-ups in what a checkpoint says about itself (config.json, GGUF keys)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tiered.checkpoints.checkpoint import CheckpointError

_REQUIRED: Any = object()


class Facts:
    """Values of `source`, checked. Several names mean: the first that is there.

    A missing or impossible value is a CheckpointError that names the file and the key. `prefix`
    goes before each name (GGUF's keys start with the architecture).
    """

    def __init__(self, values: Mapping[str, Any], source: Path, prefix: str = "") -> None:
        self.values = values
        self.source = source
        self.prefix = prefix

    def __contains__(self, name: str) -> bool:
        return self.values.get(self.prefix + name) is not None

    def find(self, *names: str, default: Any = _REQUIRED) -> Any:
        for name in names:
            value = self.values.get(self.prefix + name)
            if value is not None:
                return value
        if default is _REQUIRED:
            raise CheckpointError(f"{self.source}: {self.prefix + names[0]!r} is missing")
        return default

    def integer(self, *names: str, default: Any = _REQUIRED, maximum: int = 2**31) -> int:
        """A count. A list (GGUF may have one per layer) must hold one value throughout."""
        value = self.find(*names, default=default)
        if isinstance(value, list) and value and all(item == value[0] for item in value):
            value = value[0]
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= maximum:
            raise self.error(names[0], value, f"a whole number from 0 to {maximum}")
        return value

    def number(self, *names: str, default: Any = _REQUIRED) -> float:
        value = self.find(*names, default=default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.error(names[0], value, "a number")
        if not math.isfinite(value) or value < 0 or value > 1e30:
            raise self.error(names[0], value, "a finite number that is not negative")
        return float(value)

    def flag(self, *names: str, default: Any = _REQUIRED) -> bool:
        value = self.find(*names, default=default)
        if not isinstance(value, bool):
            raise self.error(names[0], value, "true or false")
        return value

    def text(self, *names: str, default: Any = _REQUIRED) -> str:
        value = self.find(*names, default=default)
        if not isinstance(value, str):
            raise self.error(names[0], value, "a text")
        return value

    def integers(self, *names: str) -> tuple[int, ...]:
        """One whole number or a list of them; () when it is missing."""
        value = self.find(*names, default=[])
        items = value if isinstance(value, list) else [value]
        if any(isinstance(item, bool) or not isinstance(item, int) for item in items):
            raise self.error(names[0], value, "whole numbers")
        return tuple(items)

    def numbers(self, *names: str) -> tuple[float, ...]:
        """A list of numbers; () when it is missing."""
        value = self.find(*names, default=[])
        if not isinstance(value, list) or not all(type(x) in (int, float) for x in value):
            raise self.error(names[0], value, "a list of numbers")
        return tuple(float(item) for item in value)

    def mapping(self, *names: str) -> Mapping[str, Any]:
        value = self.find(*names)
        if not isinstance(value, Mapping):
            raise self.error(names[0], value, "an object")
        return value

    def error(self, name: str, value: Any, expected: str) -> CheckpointError:
        shown = repr(value)
        shown = shown if len(shown) <= 60 else shown[:57] + "..."
        return CheckpointError(
            f"{self.source}: {self.prefix + name!r} is {shown}, but must be {expected}"
        )
