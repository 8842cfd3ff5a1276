"""Uploads: how experts get from RAM, or from disk, into the slots of a GPU's memory."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, Protocol

import numpy as np

from tiered.experts import ExpertKey
from tiered.gpu.busy import Channel
from tiered.policies import Space
from tiered.store import ExpertStore
from tiered.tier import Source


class DeviceMemory(Protocol):
    """What an upload needs of the memory that it fills: see gpu_backend.slots.GpuSlots."""

    def blob_bytes(self, key: ExpertKey) -> int:
        """Of an expert."""

    def staging(self) -> AbstractContextManager[Any]:
        """A pair of buffers; `host` is uint8, in RAM."""

    def upload(self, key: ExpertKey, slot: int, blob: Any, staging: Any) -> None:
        """Bring a blob, which lies in `staging.host` or is page-locked, into a slot by way of
        `staging.device`; returns when it is there."""


class Below(Protocol):
    """What a tier in a GPU's memory reads from."""

    def __contains__(self, key: ExpertKey) -> bool:
        """Whether it is in RAM."""

    def lent(self, key: ExpertKey, buffer: Any) -> AbstractContextManager[Any]:
        """See Tier.lent."""


class Uploads:
    """The source of a tier in a GPU's memory: reads from the source below, then copies.

    What its `read_into` is given to fill is a slot of `memory`, with its `number`.
    """

    def __init__(self, below: Below, memory: DeviceMemory, link: Channel | None = None) -> None:
        self.below = below
        self.memory = memory
        self.link = link  # measures copies, with the way to the staging buffer, if there is one

    def read_into(self, key: ExpertKey, buffer: Any) -> None:
        with self.memory.staging() as staging, ExitStack() as held:
            if is_there := key in self.below:
                held.enter_context(self._request(key))
            blob = held.enter_context(self.below.lent(key, staging.host))
            if not is_there:  # what the disk took is no cost of copies
                held.enter_context(self._request(key))
            try:
                self.memory.upload(key, buffer.number, blob, staging)
            except RuntimeError as error:  # a device that failed; tiers know OSError
                raise OSError(f"the copy to the GPU failed: {error}") from error

    def _request(self, key: ExpertKey) -> AbstractContextManager[None]:
        return self.link.request(self.memory.blob_bytes(key)) if self.link else nullcontext()


class TimedReads:
    """A source below a RAM tier, whose reads a channel measures."""

    def __init__(self, below: Source, space: Space, disk: Channel) -> None:
        self._below, self._space, self._disk = below, space, disk

    def read_into(self, key: ExpertKey, buffer: Any) -> None:
        with self._disk.request(self._space.nbytes(key)):
            self._below.read_into(key, buffer)


class MappedBlobs:
    """Blobs of a store whose experts all fit in RAM: copied from the memory map of its files, which
    is read-only, so that drivers may refuse to lock it."""

    def __init__(self, store: ExpertStore) -> None:
        self._store = store

    def __contains__(self, key: ExpertKey) -> bool:
        return True

    @contextmanager
    def lent(self, key: ExpertKey, buffer: np.ndarray) -> Iterator[np.ndarray]:
        layout = self._store.layouts(key.layer).layout(key.expert)
        for address, tensor in zip(self._store.addresses(key), layout, strict=True):
            target = buffer[tensor.offset : tensor.offset + tensor.nbytes]
            ctypes.memmove(target.ctypes.data, int(address), tensor.nbytes)
        yield buffer
