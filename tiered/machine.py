"""A simulated machine: its GPU, link, processor and disk as queues on a virtual clock.

Times are seconds of virtual time. Nothing here is measured.
"""

from __future__ import annotations

from collections.abc import Sequence

from tiered.costs import Costs, Line
from tiered.hardware import GB, Hardware

MICRO = 1e-6
KERNELS_PER_ATTENTION = 6


class Machine:
    """`now` is the time of the GPU's (or, without one, the processor's) main thread of work."""

    def __init__(self, hardware: Hardware) -> None:
        host, disk, gpu = hardware.host, hardware.disk, hardware.gpu
        self.hardware = hardware
        self.now = 0.0
        self.link_free = 0.0  # when the last queued copy ends
        self.disk_free = 0.0
        self.copied = 0  # bytes over the link
        self.read_bytes = 0
        self.wake = host.wake * MICRO
        self.overhead = host.overhead * MICRO
        self._cpu = host.bandwidth * host.efficiency * GB
        self._dense = host.bandwidth * host.attention_efficiency * GB
        self._head = host.bandwidth * host.head_efficiency * GB
        self._disk = disk.bandwidth * GB
        self._disk_latency = disk.latency * MICRO
        self.sync = self.launch = 0.0
        self._cpu_copying = self._cpu
        if gpu is not None:
            self.sync, self.launch = gpu.sync * MICRO, gpu.launch * MICRO
            self._gpu = self._dense = self._head = gpu.bandwidth * gpu.efficiency * GB
            self._link = gpu.link * GB
            self._copy_latency = gpu.copy_latency * MICRO
            # Copies read the same DRAM that the processor computes from.
            left = max(host.bandwidth - gpu.link, 0.25 * host.bandwidth) * GB
            self._cpu_copying = min(self._cpu, left)

    def dense_seconds(self, nbytes: float) -> float:
        """Weights and keys and values that a token is multiplied with, on the main device."""
        return nbytes / self._dense + KERNELS_PER_ATTENTION * self.launch

    def head_seconds(self, nbytes: float) -> float:
        return nbytes / self._head + self.launch

    def gpu_seconds(self, nbytes: float) -> float:
        return nbytes / self._gpu + 2 * self.launch if nbytes else 0.0

    def copy(self, nbytes: int, start: float) -> float:
        """Queue a copy to the GPU; returns when it has arrived."""
        begin = max(self.link_free, start)
        self.link_free = begin + self._copy_latency + nbytes / self._link
        self.copied += nbytes
        return self.link_free

    def copy_end(self, nbytes: int, start: float) -> float:
        """When a copy would arrive that were queued now."""
        return max(self.link_free, start) + self._copy_latency + nbytes / self._link

    def read(self, nbytes: int, start: float) -> float:
        """Queue a read from disk; returns when the bytes are in RAM."""
        self.disk_free = max(self.disk_free, start) + nbytes / self._disk
        self.read_bytes += nbytes
        return self.disk_free + self._disk_latency

    def cpu_end(self, nbytes: float, start: float) -> float:
        """When the processor, starting then, is done with experts; slower while copies run."""
        copying = max(0.0, self.link_free - start)
        done = copying * self._cpu_copying
        if nbytes <= done:
            return start + nbytes / self._cpu_copying
        return start + copying + (nbytes - done) / self._cpu

    def cpu_run(self, work: Sequence[tuple[float, int]], start: float) -> tuple[float, float]:
        """Compute (ready time, bytes) in this order, in groups of what is ready.

        Returns when it is done, and how long it was busy.
        """
        end, busy, at = start, 0.0, 0
        while at < len(work):
            begin = max(end, work[at][0])
            nbytes = 0
            while at < len(work) and work[at][0] <= begin:
                nbytes += work[at][1]
                at += 1
            end = self.cpu_end(nbytes, begin + self.wake)
            busy += end - begin
        return end, busy

    def costs(self, nbytes: int) -> Costs:
        """What a scheduler would have learnt about this machine after a while."""
        cpu = Line(self.wake, 1 / self._cpu, nbytes)
        disk = Line(self._disk_latency, 1 / self._disk, nbytes)
        if self.hardware.gpu is None:
            return Costs(cpu, cpu, cpu, disk)
        gpu = Line(2 * self.launch, 1 / self._gpu, nbytes)
        link = Line(self._copy_latency, 1 / self._link, nbytes)
        return Costs(gpu, cpu, link, disk, self._cpu / self._cpu_copying)
