"""Floors: how much room a tier needs at least, and below which a policy cannot do well."""

from __future__ import annotations

from tiered.memory import format_bytes
from tiered.policies import Policy, Space


def floor_bytes(space: Space, top_k: int) -> int:
    """The experts of one token in one layer: a tier must hold them at the same time, whichever."""
    return top_k * max(space.blob_bytes)


def cycle_bytes(space: Space, top_k: int) -> int:
    """One token cycle: the experts that one token needs in all layers."""
    return round(top_k * sum(space.average_bytes))


def check_budget(space: Space, top_k: int, policy: Policy) -> list[str]:
    """Warnings about a tier's budget. Raises MemoryError, with what would work, below the floor.

    Layers take turns, so below one token cycle the least recently used expert is the very next
    one needed: one LRU over all layers then hits nothing. Policies that think of layers do not
    have that cliff; they are those with a `victim_for`.
    """
    floor, cycle = floor_bytes(space, top_k), cycle_bytes(space, top_k)
    if space.capacity < floor:
        raise MemoryError(
            f"an expert budget of {format_bytes(space.capacity)} cannot hold the {top_k} experts "
            f"of one token in one layer: give at least {floor} bytes ({format_bytes(floor)})"
        )
    if space.capacity >= cycle:
        return []
    warning = (
        f"an expert budget of {format_bytes(space.capacity)} is less than one token needs "
        f"({format_bytes(cycle)}): few reads can be saved"
    )
    if not hasattr(policy, "victim_for"):
        warning += ", and a policy over all layers may save none; use layer_lru or keep_last"
    return [warning]
