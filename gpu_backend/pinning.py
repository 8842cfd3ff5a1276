"""How much memory can be page-locked, found out carefully.

Systems limit it: some to half of the RAM, Windows to a few GB, WSL to less than one. A failed
request can leave the CUDA context with an error that sticks, so the limit is probed once, in small
pieces, at a time when nothing else is at stake, and only a part of what worked is used afterwards
(see tiered.page_locked). Knows nothing of torch: `pin` and `unpin` are given.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

PIECE, SMALLEST_PIECE = 256 << 20, 1 << 20  # bytes


class Pinner(Protocol):
    """Locks and unlocks ranges of memory."""

    def pin(self, address: int, nbytes: int) -> bool:
        """False if the system refuses."""

    def unpin(self, address: int) -> None: ...


class Arena(NamedTuple):
    """Memory of our own, page-aligned."""

    address: int
    nbytes: int


def probe_limit(pinner: Pinner, arena: Arena) -> int:
    """Bytes of the arena that could be locked at once. Nothing stays locked.

    Pieces are halved when one is refused, so that the answer is exact to the smallest.
    """
    pinned: list[int] = []
    at, piece = 0, PIECE
    try:
        while at < arena.nbytes and piece >= SMALLEST_PIECE:
            size = min(piece, arena.nbytes - at)
            if pinner.pin(arena.address + at, size):
                pinned.append(arena.address + at)
                at += size
            else:
                piece //= 2
    finally:
        for address in reversed(pinned):
            pinner.unpin(address)
    return at
