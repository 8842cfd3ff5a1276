"""Page-locked memory: what a GPU copies from where it is. From all other memory, bytes pass a
buffer, which takes the processor's time and its memory's."""

from __future__ import annotations

import logging
from typing import Protocol

from tiered.memory import format_bytes

log = logging.getLogger("tiered")

PIECE = 256 << 20  # bytes, about: a driver that refuses has little to undo
USABLE = 0.8  # of what could be locked: others need some, too


class Pinner(Protocol):
    """Locks and unlocks ranges of memory: a GPU's driver does."""

    def pin(self, address: int, nbytes: int) -> bool:
        """False if the system refuses."""

    def unpin(self, address: int) -> None: ...


class PageLocked:
    """Which addresses of a memory are page-locked; `nbytes` of them are. None, until `lock`.

    Close it before the memory goes away, or is given back in part.
    """

    def __init__(self) -> None:
        self.nbytes = 0
        self._begin = 0
        self._pinner: Pinner | None = None
        self._pieces: list[int] = []  # bytes of each

    def __contains__(self, address: int) -> bool:
        return self._begin <= address < self._begin + self.nbytes

    def lock(self, pinner: Pinner, begin: int, num_slots: int, stride: int) -> None:
        """Lock so many slots, as far as the system allows, in pieces of whole ones: a copy cannot
        go from one piece to the next."""
        assert not self._pieces
        self._pinner, self._begin = pinner, begin
        wanted, piece = num_slots * stride, max(1, PIECE // stride) * stride
        while self.nbytes < wanted:
            size = min(piece, wanted - self.nbytes)
            if not pinner.pin(begin + self.nbytes, size):
                self._keep(int(USABLE * self.nbytes))
                log.warning(
                    "only %s of %s could be page-locked: copies of the rest to the GPU are slower",
                    format_bytes(self.nbytes), format_bytes(wanted),
                )  # fmt: skip
                return
            self._pieces.append(size)
            self.nbytes += size

    def close(self) -> None:
        """Unlock all of it. Closing twice is harmless."""
        self._keep(0)

    def _keep(self, nbytes: int) -> None:
        while self.nbytes > nbytes:
            assert self._pinner is not None
            self.nbytes -= self._pieces.pop()
            self._pinner.unpin(self._begin + self.nbytes)
