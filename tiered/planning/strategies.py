"""Strategies: what is done with an expert that the GPU needs and does not have."""

from __future__ import annotations

from typing import NamedTuple


class Strategy(NamedTuple):
    """What happens to an expert that the GPU needs and does not have."""

    share: float | None  # of a layer's misses that are copied, the rest runs on the CPU
    cached: bool = True  # experts stay on the GPU
    keep: str = "popular"  # which stay on the GPU: "always" (whatever was copied last), "recent"
    # (the same, but nothing leaves that is in no other memory), "popular" or "never"
    promote: bool = False  # copy what the CPU computed when the link is idle, if it is worth it


STRATEGIES = {
    "on-demand": Strategy(1.0, cached=False, keep="never"),  # copy each expert each time
    "copy": Strategy(1.0, keep="always"),  # an expert cache that copies every miss
    "cpu": Strategy(0.0, cached=False, keep="never"),  # attention on the GPU, experts on the CPU
    "fixed": Strategy(0.0, keep="never"),  # the hottest experts on the GPU for good
    "half": Strategy(0.5, keep="always"),  # a cache that copies every other miss
    "fixed-half": Strategy(0.5, keep="never"),  # the hottest for good, every other miss copied
    # Whatever ends soonest; what was copied for it stays. As gpu/placement.py does it, whose
    # governors use one of GOVERNED where that is quicker.
    "tiered": Strategy(None, keep="always", promote=True),
}

GOVERNED = (
    STRATEGIES["tiered"]._replace(promote=False),
    STRATEGIES["half"],
    STRATEGIES["copy"],
)
DYNAMIC = (
    Strategy(None, promote=True),
    Strategy(None, keep="recent"),
    Strategy(None, keep="always"),
    Strategy(0.0, keep="popular", promote=True),
)
# What other programs do all the time: the plans that a dynamic choice must not lose to.
STATIC = (
    STRATEGIES["fixed"],
    STRATEGIES["copy"],
    STRATEGIES["half"],
    STRATEGIES["fixed-half"],
)


class Budgets(NamedTuple):
    """Bytes for experts in each memory."""

    vram: int
    ram: int
