"""Which part of a model gets how many bits, so that a size is kept and least is lost."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import NamedTuple


class Unit(NamedTuple):
    """What has one format: `part` is "gate_up" or "down", of an expert of a layer or of all."""

    layer: int
    part: str
    expert: int | None = None


class Option(NamedTuple):
    """A format that a unit may have."""

    format: str
    nbytes: int
    loss: float  # what it costs; losses of all units add up


class Step(NamedTuple):
    """From an option to a larger one."""

    gain: float  # of loss, per byte
    unit: Unit
    smaller: Option
    larger: Option


def allocate(options: Mapping[Unit, list[Option]], budget: int) -> dict[Unit, str]:
    """A format for each unit, all together within `budget` bytes; ValueError if nothing fits.

    What gains most per byte comes first. Of a unit's options only those on the lower convex hull of
    loss over size can be best at any budget (Shoham and Gersho, 1988).
    """
    hulls = {unit: lower_hull(choices) for unit, choices in options.items()}
    chosen = {unit: hull[0] for unit, hull in hulls.items()}
    left = budget - sum(option.nbytes for option in chosen.values())
    if left < 0:
        raise ValueError(f"the smallest choice takes {budget - left} bytes, more than {budget}")
    steps = [
        Step((a.loss - b.loss) / (b.nbytes - a.nbytes), unit, a, b)
        for unit, hull in hulls.items()
        for a, b in pairwise(hull)
    ]
    for step in sorted(steps, key=lambda step: -step.gain):
        cost = step.larger.nbytes - step.smaller.nbytes
        # Gains of a unit fall from step to step, so its steps come in order; where one did not fit,
        # the next would leave a gap.
        if cost <= left and chosen[step.unit] is step.smaller:
            chosen[step.unit] = step.larger
            left -= cost
    return {unit: option.format for unit, option in chosen.items()}


def lower_hull(options: list[Option]) -> list[Option]:
    """The options that are best for some price of a byte, by ascending size and falling loss."""
    hull: list[Option] = []
    for option in sorted(options, key=lambda option: (option.nbytes, option.loss)):
        if hull and option.loss >= hull[-1].loss:
            continue
        while len(hull) > 1 and _slope(hull[-2], option) >= _slope(hull[-2], hull[-1]):
            hull.pop()
        hull.append(option)
    return hull


def _slope(a: Option, b: Option) -> float:
    """How much of the loss goes per byte."""
    return (a.loss - b.loss) / (b.nbytes - a.nbytes)
