"""A GPU that every machine has: its memory is RAM that only it may touch, its time is virtual.

Copies run on one FIFO stream, kernels on another. A copy's bytes arrive when the virtual clock
reaches its end; whoever reads a slot before that, or overwrites one that a kernel still reads, gets
a RuntimeError. Arithmetic is the CPU's, so a model says bit by bit what it says without a GPU.
Needs neither torch nor triton.
"""

from __future__ import annotations

import heapq
import itertools
import threading
from typing import NamedTuple

import numpy as np

from cpu_kernels.backend import CpuBackend
from gpu_backend.slots import ON_DEVICE, GpuSlots


class VirtualClock:
    """Seconds that pass only when something is waited for. Calling it tells the time."""

    def __init__(self):
        self.now = 0.0
        self._events = []
        self._count = itertools.count()

    def __call__(self):
        return self.now

    def at(self, time, effect):
        heapq.heappush(self._events, (time, next(self._count), effect))

    def advance_to(self, time):
        while self._events and self._events[0][0] <= time:
            at, _, effect = heapq.heappop(self._events)
            self.now = max(self.now, at)
            effect()
        self.now = max(self.now, time)


class Stream:
    """First in, first out: work begins when what was given before has ended."""

    def __init__(self, clock):
        self._clock = clock
        self.end = 0.0

    def run(self, seconds, after=0.0):
        begin = max(self._clock.now, self.end, after)
        self.end = begin + seconds
        return begin, self.end


class Staging(NamedTuple):
    host: np.ndarray
    device: np.ndarray


class FakeGpu:
    """The device: what gpu_backend.device.TorchDevice is to CUDA. Thread-safe.

    `vram` in bytes, `link` and `bandwidth` in bytes per second. `fail_copies`: numbers of the
    copies, counted from 0, that are aborted.
    """

    def __init__(self, vram=1 << 30, link=10e9, bandwidth=100e9, latency=1e-5, fail_copies=()):
        self.clock = VirtualClock()
        self.lock = threading.RLock()
        self.compute, self.copies = Stream(self.clock), Stream(self.clock)
        self.free, self.link, self.bandwidth, self.latency = vram, link, bandwidth, latency
        self.fail_copies = set(fail_copies)
        self.num_copies = 0
        self.marked = 0.0
        self.synchronizes = True  # False: forgets to let copies wait for kernels (a bug to find)
        self.in_flight = {}  # slot -> when its bytes arrive
        self.readers = {}  # slot -> until when a kernel reads it

    # -- what GpuSlots uses --

    def allocate(self, nbytes, what):
        if nbytes > self.free:
            raise MemoryError(f"{what} takes {nbytes} bytes, and {self.free} are free")
        self.free -= nbytes
        return np.zeros(nbytes, np.uint8)

    def table(self, *shape):
        return np.full(shape, -1, np.int32)

    def staging(self, nbytes):
        return Staging(np.zeros(nbytes, np.uint8), self.allocate(nbytes, "a staging buffer"))

    def mark(self):
        with self.lock:
            self.marked = self.compute.end

    def upload(self, staging, nbytes, then):
        with self.lock:
            number, self.num_copies = self.num_copies, self.num_copies + 1
            if number in self.fail_copies:
                raise RuntimeError("the copy was aborted")
            after = self.marked if self.synchronizes else 0.0
            begin, end = self.copies.run(self.latency + nbytes / self.link, after)
            slot = then.keywords["slot"]
            if self.readers.get(slot, 0.0) > begin:
                raise RuntimeError(f"race: slot {slot} is overwritten while a kernel reads it")
            self.in_flight[slot] = end
            blob = staging.host[:nbytes].copy()

            def arrive():
                staging.device[:nbytes] = blob
                then(staging.device)
                del self.in_flight[slot]

            self.clock.at(end, arrive)
            return end

    def wait(self, ticket):
        with self.lock:
            self.clock.advance_to(ticket)

    # -- what a backend uses --

    def kernel(self, slots, nbytes):
        """Launch something that reads these slots."""
        with self.lock:
            begin, end = self.compute.run(nbytes / self.bandwidth)
            for slot in slots:
                if slot in self.in_flight:
                    raise RuntimeError(f"race: slot {slot} is read before its copy has ended")
                self.readers[slot] = end
            return begin, end

    def close(self):
        with self.lock:
            self.clock.advance_to(max(self.compute.end, self.copies.end))


def keep_blocks(blob, target, format, num_blocks):
    """In place of gpu_backend's rearrangement: CPU kernels read blocks as files have them."""
    target[:] = blob[: len(target)]


class FakeGpuBackend(CpuBackend):
    """A CpuBackend whose experts are in a GPU's slots, or in RAM for those that are not."""

    name = "fake"

    def __init__(self, device=None, threads=2):
        super().__init__(threads)
        self.device = device or FakeGpu()
        self.computed = {"gpu": 0, "cpu": 0}

    def slots(self, space, layouts, num_experts):
        self._slots = GpuSlots(self.device, space, layouts, keep_blocks, num_experts)
        return self._slots

    def experts(self, h, layer, addresses, jobs, out):
        here = addresses[:, 0] >= ON_DEVICE
        assert here.all() or not here.any()
        if not here.any():
            self.computed["cpu"] += len(addresses)
            super().experts(h, layer, addresses, jobs, out)
            return
        self.computed["gpu"] += len(addresses)
        starts = addresses[:, 0] - ON_DEVICE
        slots = (starts // self._slots.stride).tolist()
        self.device.kernel(slots, len(slots) * self._slots.stride)
        inside = addresses - ON_DEVICE + self._slots.slab.ctypes.data
        super().experts(h, layer, inside, jobs, out)
        self.device.mark()

    def close(self):
        self.device.close()
        super().close()
