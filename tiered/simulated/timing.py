"""Timing: whose seconds an engine takes, this machine's or a described one's."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from time import perf_counter
from typing import NamedTuple

from tiered.loaders import Loaders, Loads
from tiered.planning.machine import Machine
from tiered.simulated.clock import VirtualClock
from tiered.simulated.disk import SimulatedDisk
from tiered.simulated.loaders import SimulatedLoaders
from tiered.store import ExpertStore
from tiered.tier import Source


class Timing(NamedTuple):
    """`label` is empty for what is real."""

    clock: Callable[[], float]
    make_loaders: Callable[..., Loads]
    disk: Callable[[ExpertStore], Source]  # what a tier in RAM reads from, instead of the store
    label: str = ""


REAL = Timing(perf_counter, Loaders, lambda store: store)


def simulated(clock: VirtualClock, machine: Machine, label: str) -> Timing:
    """On a virtual clock, with the disk of a described machine."""
    loaders = partial(SimulatedLoaders, clock)
    return Timing(clock, loaders, lambda store: SimulatedDisk(store, machine, clock), label)
