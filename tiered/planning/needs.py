"""Needs: the memory that a model takes, whole or at least, and what of it there is."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from tiered.memory import format_bytes
from tiered.planning.forecast import PROCESS
from tiered.planning.sizes import ModelSizes


@dataclass(frozen=True)
class Needs:
    """Bytes of a process that runs the model; `least` is with one layer's experts in memory."""

    context: int  # tokens that the KV cache is for
    all: int
    least: int
    free: int
    experts_in_memory: float  # the share that fits into what is free

    @property
    def verdict(self) -> str:
        """One sentence: does it fit?"""
        free = format_bytes(self.free)
        if self.free >= self.all:
            return f"it fits: it takes {format_bytes(self.all)} of memory, and {free} are free"
        if self.all == self.least:
            return f"it does not fit: it takes {format_bytes(self.all)}, and {free} are free"
        if self.free < self.least:
            return (
                f"it does not run: it takes {format_bytes(self.least)} at least "
                f"({format_bytes(self.all)} with all experts), and {free} are free"
            )
        return (
            f"{self.experts_in_memory:.0%} of the experts fit into the {free} that are free; it "
            f"takes {format_bytes(self.all)} for all, {format_bytes(self.least)} at least"
        )

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def needs_of(sizes: ModelSizes, free: int, context: int = 4096) -> Needs:
    """What a model needs with a KV cache of `context` tokens, beside `free` bytes."""
    context = min(context, sizes.context_length)
    fixed = PROCESS + sizes.dense + sizes.kv_per_token * context
    room = min(sizes.all_experts, max(0, free - fixed))
    return Needs(
        context,
        fixed + sizes.all_experts,
        fixed + sizes.floor,
        free,
        room / sizes.all_experts if sizes.all_experts else 1.0,
    )
