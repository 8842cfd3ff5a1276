"""Needs: the memory that a model takes, whole or at least, and what of it there is."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from tiered.memory import format_bytes
from tiered.planning.forecast import PROCESS
from tiered.planning.sizes import ModelSizes


@dataclass(frozen=True)
class Needs:
    """Bytes of a process that runs the model; the least is with one layer's experts in memory."""

    context: int  # tokens that the KV cache is for
    all_bytes: int
    least_bytes: int
    free_bytes: int
    experts_in_memory: float  # the share that fits into what is free

    @property
    def verdict(self) -> str:
        """One sentence: does it fit?"""
        whole, least, free = map(format_bytes, (self.all_bytes, self.least_bytes, self.free_bytes))
        if self.free_bytes >= self.all_bytes:
            return f"it fits: it takes {whole} of memory, and {free} are free"
        if self.all_bytes == self.least_bytes:
            return f"it does not fit: it takes {whole}, and {free} are free"
        if self.free_bytes < self.least_bytes:
            return (
                f"it does not run: it takes {least} at least ({whole} with all experts), and "
                f"{free} are free"
            )
        return (
            f"{self.experts_in_memory:.0%} of the experts fit into the {free} that are free; it "
            f"takes {whole} for all, {least} at least"
        )

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def needs_of(sizes: ModelSizes, free: int, context: int = 4096) -> Needs:
    """What a model needs with a KV cache of `context` tokens, beside `free` bytes."""
    context = min(context, sizes.context_length)
    fixed = PROCESS + sizes.dense + sizes.kv(context)
    room = min(sizes.all_experts, max(0, free - fixed))
    return Needs(
        context,
        fixed + sizes.all_experts,
        fixed + sizes.floor,
        free,
        room / sizes.all_experts if sizes.all_experts else 1.0,
    )
