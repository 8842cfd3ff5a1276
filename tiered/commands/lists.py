"""Values separated by commas: the axes of a grid."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import click

from tiered.memory import parse_bytes

Value = TypeVar("Value")


def split(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def sizes(text: str | None) -> list[int]:
    return [parse_bytes(part) for part in split(text)] if text else [0]


def integers(name: str, text: str, least: int = 0, most: int | None = None) -> list[int]:
    numbers = _numbers(name, text, int, "whole numbers")
    for number in numbers:
        if number < least or (most is not None and number > most):
            allowed = f"{least} or more" if most is None else f"{least} to {most}"
            raise click.UsageError(f"{name} takes {allowed}, not {number}")
    return numbers


def floats(name: str, text: str) -> list[float]:
    return _numbers(name, text, float, "numbers")


def _numbers(name: str, text: str, kind: Callable[[str], Value], what: str) -> list[Value]:
    try:
        return [kind(part) for part in split(text)]
    except ValueError as error:
        raise click.UsageError(f"{name} takes {what}, not {text!r}") from error


def budgets(text: str | None, all_experts: int) -> list[int]:
    """Bytes for experts, of sizes or shares: 2G,60%; 0 for all that they need: all."""
    result = []
    for part in split(text or "all"):
        if part.endswith("%"):
            (share,) = floats("a budget", part[:-1])
            result.append(int(all_experts * share / 100))
        else:
            result.append(0 if part == "all" else parse_bytes(part))
    return result
