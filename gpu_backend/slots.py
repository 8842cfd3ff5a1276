"""Slots for experts in GPU memory: one slab, and a table that says who is where.

The memory of a tier (see tiered.slots). A slot is found by the byte where it begins in the slab.
What a loader thread is given to fill is the slot's number; the bytes come to a staging buffer on
the GPU, are rearranged from there (see gpu_backend.formats), and then, in the same stream, the
table is written: kernels that look experts up there never see one that has not arrived. Knows
nothing of torch.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple, Protocol

from cpu_kernels.formats import FORMATS
from gpu_backend.layouts import Layout, Layouts

# Added to the place of a slot, so that an address tells on which side a blob lies.
ON_DEVICE = 1 << 62

Rearrange = Callable[[Any, Any, str, int], None]


class Device(Protocol):
    """What slots need of a device: gpu_backend.device.TorchDevice, or a fake one."""

    def allocate(self, nbytes: int, what: str) -> Any: ...

    def table(self, *shape: int) -> Any: ...

    def staging(self, nbytes: int) -> Any: ...

    def upload(self, blob: Any, staging: Any, nbytes: int, then: Callable[[Any], None]) -> Any: ...

    def wait(self, ticket: Any) -> None: ...


class Slot(NamedTuple):
    """A slot to be filled, by number."""

    memory: GpuSlots
    number: int


class GpuSlots:
    """`space.num_slots` slots of the same size; `layouts` are those of the sparse layers' experts.

    They lie at the beginning of `slab`, which has `nbytes` at least. Its end may serve another
    purpose while the tier uses fewer slots: see Tier.use_slots.

    Raises MemoryError, with nothing left allocated, if the device has too little memory.
    """

    def __init__(
        self,
        device: Device,
        space: Any,
        layouts: dict[int, Layouts],
        rearrange: Rearrange,
        num_experts: int = 0,
        nbytes: int = 0,
        num_staging: int = 3,
    ) -> None:
        self.space = space
        self.layouts = layouts
        self._distinct = dict.fromkeys(each for of in layouts.values() for each in of.distinct)
        self.stride = max(layout.nbytes for layout in self._distinct)
        self._device, self._rearrange = device, rearrange
        self._free = [device.staging(self.stride) for _ in range(num_staging)]
        self._returned = threading.Condition()
        nbytes = max(nbytes, space.num_slots * self.stride)
        self.slab: Any = device.allocate(nbytes, "expert slots")
        self.table = device.table(max(layouts) + 1, num_experts)
        self._owners: dict[int, tuple[int, int]] = {}  # slot -> (layer, expert)
        self._writing = threading.Lock()  # table entries are written in the order of the copies

    def slot(self, slot: int) -> Slot:
        return Slot(self, slot)

    def place(self, slot: int) -> int:
        return ON_DEVICE + slot * self.stride

    def fit(self, slot: int, nbytes: int) -> None:
        """All slots have room for the largest blob: nothing to do."""

    def give_back(self, slot: int) -> None:
        """Nobody is there any more, whatever the slot's memory will hold."""
        with self._writing:
            owner = self._owners.pop(slot, None)
            if owner is not None:
                self.table[owner] = -1

    def try_out(self) -> None:
        """Fill the first slot with anything, once for each layout: what this needs is compiled now,
        and not by several loaders at a time. Before anybody is there."""
        with self.staging() as pair:
            for layout in self._distinct:
                self._fill(0, pair.device, layout)

    @contextmanager
    def staging(self) -> Iterator[Any]:
        """A pair of buffers of one's own; waits until one is free."""
        with self._returned:
            while not self._free:
                self._returned.wait()
            pair = self._free.pop()
        try:
            yield pair
        finally:
            with self._returned:
                self._free.append(pair)
                self._returned.notify()

    def blob_bytes(self, key: tuple[int, int]) -> int:
        """Of an expert, whose slot may have room for more."""
        return int(self._layout(key).nbytes)

    def _layout(self, key: tuple[int, int]) -> Any:
        return self.layouts[key[0]].layout(key[1])

    def upload(self, key: tuple[int, int], slot: int, blob: Any, staging: Any) -> None:
        """Bring a blob, in `staging.host` or page-locked, into a slot; returns when it is there."""
        with self._writing:
            arrange = partial(self._arrange, key=key, slot=slot)
            ticket = self._device.upload(blob, staging, self.blob_bytes(key), arrange)
        self._device.wait(ticket)

    def _arrange(self, blob: Any, key: tuple[int, int], slot: int) -> None:
        """On the copy stream: forget who was in the slot, fill it, say who is there."""
        before = self._owners.pop(slot, None)
        if before is not None and before != key:
            self.table[before] = -1
        self._fill(slot, blob, self._layout(key))
        self._owners[slot] = key
        self.table[key] = slot

    def _fill(self, slot: int, blob: Any, layout: Layout) -> None:
        begin = slot * self.stride
        for tensor in (layout.gate, layout.up, layout.down):
            block = FORMATS[tensor.format]
            num_blocks = tensor.shape[0] * tensor.shape[1] // block.block_size
            end = tensor.offset + num_blocks * block.block_bytes
            target = self.slab[begin + tensor.offset : begin + end]
            self._rearrange(blob[tensor.offset : end], target, tensor.format, num_blocks)

    def close(self) -> None:
        """Give the memory back, as soon as nobody holds a part of it."""
        with self._returned:
            self._free.clear()
        self.slab = None
