"""Strategies: what is done with an expert that the GPU needs and does not have."""

from __future__ import annotations

from typing import NamedTuple


class Strategy(NamedTuple):
    """What happens to an expert that the GPU needs and does not have."""

    share: float | None  # of a layer's misses that are copied, the rest runs on the CPU
    cached: bool = True  # experts stay on the GPU
    keep: bool = False  # also those that were copied for a layer; else the hottest, for good
    promote: bool = False  # copy what the CPU computed when the link is idle, if it is worth it


STRATEGIES = {
    "on-demand": Strategy(1.0, cached=False),  # copy each expert each time
    "copy": Strategy(1.0, keep=True),  # an expert cache that copies every miss
    "cpu": Strategy(0.0, cached=False),  # attention on the GPU, experts on the CPU
    "fixed": Strategy(0.0),  # the hottest experts on the GPU for good
    "half": Strategy(0.5, keep=True),  # a cache that copies every other miss
    "fixed-half": Strategy(0.5),  # the hottest for good, every other miss copied
    # Whatever ends soonest; what was copied for it stays. As gpu/placement.py does it, whose
    # governors use one of GOVERNED where that is quicker.
    "tiered": Strategy(None, keep=True, promote=True),
}

GOVERNED = (
    STRATEGIES["tiered"]._replace(promote=False),
    STRATEGIES["half"],
    STRATEGIES["copy"],
)


class Budgets(NamedTuple):
    """Bytes for experts in each memory."""

    vram: int
    ram: int
