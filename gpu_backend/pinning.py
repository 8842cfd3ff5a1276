"""How much memory can be page-locked, found out carefully.

Systems limit it: some to half of the RAM, Windows to a few GB, WSL to less than one. A failed
request can leave the CUDA context with an error that sticks, so the limit is probed once, in small
pieces, at a time when nothing else is at stake, and only a part of what worked is used afterwards.
Knows nothing of torch: `pin` and `unpin` are given.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import NamedTuple, Protocol

log = logging.getLogger("tiered")

PIECE = 256 << 20  # bytes
USABLE = 0.8  # of what could be locked: others need some, too


class Pinner(Protocol):
    """Locks and unlocks ranges of memory."""

    def pin(self, address: int, nbytes: int) -> bool:
        """False if the system refuses."""

    def unpin(self, address: int) -> None: ...


class Arena(NamedTuple):
    """Memory of our own, page-aligned."""

    address: int
    nbytes: int


def probe_limit(pinner: Pinner, arena: Arena, piece: int = PIECE, smallest: int = 1 << 20) -> int:
    """Bytes of the arena that could be locked at once. Nothing stays locked.

    Pieces are halved when one is refused, so that the answer is exact to `smallest`.
    """
    pinned: list[int] = []
    at = 0
    try:
        while at < arena.nbytes and piece >= smallest:
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


class PinnedArena:
    """Locks the first part of an arena, at most `limit` bytes of it, in pieces.

    `nbytes` is how much is locked; copies from the rest go through a staging buffer. Use `with`,
    or `close`, before the memory goes away.
    """

    def __init__(self, pinner: Pinner, arena: Arena, limit: int, piece: int = PIECE) -> None:
        self.arena = arena
        self.nbytes = 0
        self._pinner = pinner
        self._pieces: list[int] = []
        wanted = min(limit, arena.nbytes)
        while self.nbytes < wanted:
            size = min(piece, wanted - self.nbytes)
            address = arena.address + self.nbytes
            if not pinner.pin(address, size):
                log.warning(
                    "only %d MiB of the %d MiB wanted could be page-locked; copies to the GPU from "
                    "the rest are slower",
                    self.nbytes >> 20,
                    wanted >> 20,
                )
                break
            self._pieces.append(address)
            self.nbytes += size

    def __contains__(self, address: int) -> bool:
        return self.arena.address <= address < self.arena.address + self.nbytes

    def close(self) -> None:
        """Unlock. Closing twice is harmless."""
        while self._pieces:
            self._pinner.unpin(self._pieces.pop())
        self.nbytes = 0

    def __enter__(self) -> PinnedArena:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def usable_limit(probed: int, configured: int | None = None, usable: float = USABLE) -> int:
    """What may be locked: the user's choice if it is smaller, else a part of what worked."""
    limit = int(probed * usable)
    return limit if configured is None else min(limit, configured)


def with_backoff(
    allocate: Callable[[int], object], wanted: int, least: int, shrink: float = 0.9
) -> tuple[object, int]:
    """(what `allocate(n)` returned, n) for the largest n from `wanted` down that fits.

    `allocate` raises MemoryError where it does not. Below `least` its error is passed on, with the
    number that would have been needed.
    """
    if not 0 < shrink < 1:
        raise ValueError(f"shrink must lie between 0 and 1, not {shrink}")
    num = wanted
    while True:
        try:
            return allocate(num), num
        except MemoryError as error:
            if num <= least:
                raise MemoryError(f"not even {least} would fit: {error}") from error
            num = max(least, min(num - 1, int(num * shrink)))
