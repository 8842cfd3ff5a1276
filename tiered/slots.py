"""Slots: equal rooms for blobs in one kind of memory. A tier decides what is in which slot."""

from __future__ import annotations

import contextlib
import mmap
from typing import Any, Protocol

import numpy as np

from tiered.experts import aligned
from tiered.page_locked import PageLocked, Pinner
from tiered.policies import Space
from tiered.reader import BLOCK


class Memory(Protocol):
    """Slots 0 to space.num_slots - 1, each with room for the largest blob."""

    space: Space

    def slot(self, slot: int) -> Any:
        """The buffer that a source fills: writable uint8."""

    def place(self, slot: int) -> Any:
        """What a backend finds the blob by: an address in RAM."""

    def fit(self, slot: int, nbytes: int) -> None:
        """The slot holds a blob of `nbytes` from now on; what it held beyond may be given back."""

    def give_back(self, slot: int) -> None:
        """The slot will be empty for long: it should take no memory. Nobody copies from any slot
        meanwhile."""

    def is_locked(self, slot: int) -> bool:
        """Whether a GPU can copy from the slot where it is."""

    def close(self) -> None: ...


class RamMemory:
    """Slots in RAM, page-aligned; `slack` bytes of each are room for what a read drags along.

    Layers or experts of a mixed-precision model have blobs of different sizes. Slots are addresses,
    all far enough apart for the largest blob; only the pages under a blob take memory, and pages
    beyond it are given back (`fit`). So any blob goes into any slot and the budget is still exact.
    What of it is page-locked (`lock`) takes its memory at once, and all of it.
    """

    def __init__(self, space: Space, slack: int = 0) -> None:
        self.space = space
        self._page = max(BLOCK, mmap.PAGESIZE)  # the system's is 16 or 64 KiB on some ARM machines
        self.stride = aligned(max(space.blob_bytes) + slack, self._page)
        sizes = set(filter(None, space.blob_bytes)).union(*space.mixes.values())
        self._mixed = len(sizes) > 1
        self._slack = slack
        self._extent = [0] * space.num_slots  # bytes that take memory, whole pages
        self._map = _reserve(max(1, space.num_slots) * self.stride, huge=not self._mixed)
        self._bytes = np.frombuffer(self._map, np.uint8).reshape(-1, self.stride)
        self._address = self._bytes.ctypes.data
        self.locked = PageLocked()

    def slot(self, slot: int) -> np.ndarray:
        buffer: np.ndarray = self._bytes[slot]
        return buffer

    def place(self, slot: int) -> int:
        return int(self._address + slot * self.stride)

    def fit(self, slot: int, nbytes: int) -> None:
        extent = aligned(nbytes + self._slack, self._page) if nbytes else 0
        beyond = self._extent[slot] - extent
        self._extent[slot] = extent
        if beyond > 0 and self._mixed:
            self._map.madvise(mmap.MADV_DONTNEED, slot * self.stride + extent, beyond)

    def lock(self, pinner: Pinner, limit: int) -> None:
        """Page-lock the first slots, at most `limit` bytes; none, where sizes differ: pages that
        are locked cannot be given back."""
        if not self._mixed:
            with contextlib.suppress(AttributeError, OSError):  # a child would get copies of them
                self._map.madvise(mmap.MADV_DONTFORK)
            num_slots = min(self.space.num_slots, limit // self.stride)
            self.locked.lock(pinner, self._address, num_slots, self.stride)

    def is_locked(self, slot: int) -> bool:
        return self.place(slot) in self.locked

    def give_back(self, slot: int) -> None:
        self._extent[slot] = 0
        if self.is_locked(slot):
            self.locked.close()
        self._map.madvise(mmap.MADV_DONTNEED, slot * self.stride, self.stride)

    def close(self) -> None:
        """Give the memory back as soon as nobody holds a view of it."""
        self.locked.close()
        self._bytes = np.empty((0, self.stride), np.uint8)
        del self._map


def _reserve(nbytes: int, huge: bool) -> mmap.mmap:
    """Addresses for `nbytes`; pages take memory when they are first written."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
    reserved = mmap.mmap(-1, nbytes, flags=flags)
    advice = getattr(mmap, "MADV_HUGEPAGE" if huge else "MADV_NOHUGEPAGE", None)
    if advice is not None:
        with contextlib.suppress(OSError):  # a kernel without huge pages: small ones will do
            reserved.madvise(advice)
    return reserved
