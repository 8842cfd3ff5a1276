"""A simulated machine: its GPU, link, processor and disk as queues on a virtual clock.

Times are seconds of virtual time. Nothing here is measured.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from tiered.planning.costs import Costs, Line
from tiered.planning.hardware import GB, Hardware

MICRO = 1e-6
KERNELS_PER_ATTENTION = 6


@dataclass(frozen=True)
class Rates:
    """Bytes per second, and seconds, of everything that takes time. Those of a GPU may be 0."""

    dense: float  # attention and other dense weights, on the main device
    head: float
    cpu: float  # experts on the processor
    cpu_copying: float  # ... while copies to the GPU read the same memory
    disk: float
    disk_latency: float
    wake: float
    disk_busy: float = 1.0  # share of reading that goes on while the processor computes
    cpu_reading: float = 1.0  # share of computing that goes on while the disk is read
    resume: float = 0.0  # after waiting for experts
    overhead: float = 0.0  # of control, for each layer without a GPU
    lookup: float = 0.0  # of a tier, for each layer without a GPU
    gpu: float = 0.0
    link: float = 0.0
    copy_latency: float = 0.0
    launch: float = 0.0
    sync: float = 0.0
    # Of copies from memory that is not page-locked: to the buffer that they pass, and experts on
    # the processor meanwhile.
    staging: float = math.inf
    cpu_staging: float = math.inf

    @property
    def has_gpu(self) -> bool:
        return self.gpu > 0

    @classmethod
    def of(cls, hardware: Hardware) -> Rates:
        """What a description means."""
        host, gpu, disk = hardware.host, hardware.gpu, hardware.disk
        cpu = host.bandwidth * host.efficiency * GB
        shared = {
            "cpu": cpu,
            "disk": disk.bandwidth * GB,
            "disk_latency": disk.latency * MICRO,
            "disk_busy": disk.busy_efficiency,
            "cpu_reading": disk.host_efficiency,
            "wake": host.wake * MICRO,
            "resume": host.resume * MICRO,
            "overhead": host.overhead * MICRO,
            "lookup": host.lookup * MICRO,
        }
        if gpu is None:
            dense, head = host.attention_efficiency, host.head_efficiency
            bandwidth = host.bandwidth * GB
            return cls(dense=bandwidth * dense, head=bandwidth * head, cpu_copying=cpu, **shared)
        # What passes a buffer is read and written once more.
        left, left_staging = (
            max(host.bandwidth - times * gpu.link, 0.25 * host.bandwidth) * GB for times in (1, 3)
        )
        reached = gpu.bandwidth * gpu.efficiency * GB
        return cls(
            dense=reached, head=reached, gpu=reached, cpu_copying=min(cpu, left),
            link=gpu.link * GB, copy_latency=gpu.copy_latency * MICRO,
            launch=gpu.launch * MICRO, sync=gpu.sync * MICRO, staging=host.copy * GB,
            cpu_staging=min(cpu, left_staging), **shared,
        )  # fmt: skip

    def cpu_beside(self, staged: float) -> float:
        """Experts on the processor while copies run, a share of whose bytes passes a buffer."""
        return self.cpu_copying + staged * (
            min(self.cpu_copying, self.cpu_staging) - self.cpu_copying
        )

    def costs(self, nbytes: int, staged: float = 0.0) -> Costs:
        """What a scheduler would learn about such a machine, with experts of `nbytes`, a share of
        which passes a buffer on the way to the GPU."""
        cpu = Line(self.wake, 1 / self.cpu, nbytes)
        disk = Line(self.disk_latency, 1 / self.disk, nbytes)
        if not self.has_gpu:
            return Costs(cpu, cpu, cpu, disk)
        gpu = Line(2 * self.launch, 1 / self.gpu, nbytes)
        link = Line(self.copy_latency, 1 / self.link + staged / self.staging, nbytes)
        return Costs(gpu, cpu, link, disk, self.cpu / self.cpu_beside(staged), self.sync)


class Machine:
    """`now` is the time of the GPU's (or, without one, the processor's) main thread of work."""

    def __init__(self, rates: Rates) -> None:
        self.rates = rates
        self.now = 0.0
        self.staged = 0.0  # share of the bytes that are copied now which passes a buffer first
        self.link_free = 0.0  # when the last queued copy ends
        self.disk_free = 0.0
        self.copied = 0  # bytes over the link
        self.read_bytes = 0

    def dense_seconds(self, nbytes: float) -> float:
        """Weights and keys and values that a token is multiplied with, on the main device."""
        return nbytes / self.rates.dense + KERNELS_PER_ATTENTION * self.rates.launch

    def head_seconds(self, nbytes: float) -> float:
        return nbytes / self.rates.head + self.rates.launch

    def gpu_seconds(self, nbytes: float) -> float:
        return nbytes / self.rates.gpu + 2 * self.rates.launch if nbytes else 0.0

    def copy(self, nbytes: int, start: float) -> float:
        """Queue a copy to the GPU; returns when it has arrived. A copy passes its buffer while
        others are on the link."""
        begin = start + self._staging_seconds(nbytes)
        self.link_free = max(self.link_free, begin) + self._link_seconds(nbytes)
        self.copied += nbytes
        return self.link_free

    def copy_seconds(self, nbytes: int) -> float:
        """Of a copy that is the only one."""
        return self._staging_seconds(nbytes) + self._link_seconds(nbytes)

    def _staging_seconds(self, nbytes: int) -> float:
        return self.staged * nbytes / self.rates.staging

    def _link_seconds(self, nbytes: int) -> float:
        return self.rates.copy_latency + nbytes / self.rates.link

    def read(self, nbytes: int, start: float) -> float:
        """Queue a read from disk; returns when the bytes are in RAM."""
        self.disk_free = max(self.disk_free, start) + nbytes / self.rates.disk
        self.read_bytes += nbytes
        return self.disk_free + self.rates.disk_latency

    def read_seconds(self, nbytes: int) -> float:
        """Of reads that begin together while the disk does nothing else."""
        return self.rates.disk_latency + nbytes / self.rates.disk

    def cpu_end(self, nbytes: float, start: float) -> float:
        """When the processor, starting then, is done with experts; slower while copies run."""
        copying, rate = max(0.0, self.link_free - start), self.rates.cpu_beside(self.staged)
        done = copying * rate
        if nbytes <= done:
            return start + nbytes / rate
        return start + copying + (nbytes - done) / self.rates.cpu

    def cpu_run(self, work: Sequence[tuple[float, int]], start: float) -> tuple[float, float]:
        """Compute (ready time, bytes) in this order, in groups of what is ready.

        Returns when it is done, and how long it was busy. What is still being read is read more
        slowly while the processor computes.
        """
        end, busy, at, late = start, 0.0, 0, 0.0
        while at < len(work):
            begin = max(end, work[at][0] + late)
            nbytes = 0
            while at < len(work) and work[at][0] + late <= begin:
                nbytes += work[at][1]
                at += 1
            waking = self.rates.wake + (self.rates.resume if begin > end else 0.0)
            end = self.cpu_end(nbytes, begin + waking)
            if at < len(work) and self.rates.cpu_reading < 1:
                share, reading = self.rates.cpu_reading, work[-1][0] + late - begin
                end += (1 - share) * min(reading, (end - begin) / share)
            busy += end - begin
            if at < len(work) and self.rates.disk_busy < 1:
                share, left = self.rates.disk_busy, work[-1][0] + late - begin
                late += (1 - share) * min(left / share, end - begin)
        self.disk_free += late
        return end, busy
