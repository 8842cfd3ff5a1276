"""Costs: what computing and moving experts takes, learnt while it happens.

Nothing here is a constant of some machine. Every cost is an average of what was measured lately,
also of what the processor loses while copies read the same memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Miss(NamedTuple):
    """An expert that a layer needs and the GPU does not have."""

    nbytes: float
    ready: float = 0.0  # seconds until it is in RAM: 0, or what the disk takes
    # The processor takes as long as for one row of activations and so many bytes; 0: `nbytes`.
    work: float = 0.0

    @property
    def on_cpu(self) -> float:
        return self.work or self.nbytes


class Line:
    """seconds = fixed + per_byte * nbytes, fitted to what was observed; older counts less.

    Starts from a guess that weighs as much as one observation of `nbytes`.
    """

    def __init__(self, fixed: float, per_byte: float, nbytes: float, memory: int = 64) -> None:
        self.fixed, self.per_byte = fixed, per_byte
        self._keep = 1 - 1 / memory
        self._n, self._x, self._y, self._xx, self._xy = 0.0, 0.0, 0.0, 0.0, 0.0
        self._add(nbytes, fixed + per_byte * nbytes)

    def __call__(self, nbytes: float) -> float:
        return self.fixed + self.per_byte * nbytes

    def observe(self, nbytes: float, seconds: float) -> None:
        self._add(nbytes, seconds)
        mean_x, mean_y = self._x / self._n, self._y / self._n
        variance = self._xx / self._n - mean_x**2
        slope = 0.0
        if variance > (0.1 * mean_x) ** 2:  # sizes differ enough to tell both numbers
            slope = (self._xy / self._n - mean_x * mean_y) / variance
        if 0 < slope * mean_x <= mean_y:
            self.fixed, self.per_byte = mean_y - slope * mean_x, slope
        else:
            self.fixed = min(self.fixed, 0.5 * mean_y)
            self.per_byte = (mean_y - self.fixed) / mean_x

    def _add(self, nbytes: float, seconds: float) -> None:
        self._n = self._n * self._keep + 1
        self._x = self._x * self._keep + nbytes
        self._y = self._y * self._keep + seconds
        self._xx = self._xx * self._keep + nbytes**2
        self._xy = self._xy * self._keep + nbytes * seconds


class Costs:
    """Seconds of each way to get an expert computed, by bytes of weights.

    `gpu` computes what is resident, `cpu` what is in RAM, `link` copies RAM to the GPU, `disk`
    reads into RAM. `slowdown` is how much longer the CPU takes while copies run.
    """

    def __init__(
        self,
        gpu: Line,
        cpu: Line,
        link: Line,
        disk: Line,
        slowdown: float = 1.0,
        sync: float = 1e-5,
    ) -> None:
        self.gpu, self.cpu, self.link, self.disk = gpu, cpu, link, disk
        self.slowdown = slowdown
        self.link_slowdown = 1.0  # how much longer copies take while the CPU computes experts
        self.row = 0.0  # seconds per byte that the CPU takes for each further row of activations
        self.sync = sync  # seconds until the host knows what the GPU's router chose

    @classmethod
    def unknown(cls, nbytes: float) -> Costs:
        """Before anything was measured: the order of magnitude of any machine."""
        return cls(
            Line(1e-5, 1 / 300e9, nbytes),
            Line(2e-5, 1 / 40e9, nbytes),
            Line(1e-5, 1 / 15e9, nbytes),
            Line(1e-4, 1 / 3e9, nbytes),
        )

    def observe_cpu(self, nbytes: float, seconds: float, overlap: float) -> None:
        """The CPU computed; `overlap` is the share of that time (0 to 1) in which copies ran."""
        self.slowdown = _observe(self.cpu, self.slowdown, nbytes, seconds, overlap)

    def observe_link(self, nbytes: float, seconds: float, overlap: float) -> None:
        """Something was copied; `overlap` is the share of that time in which the CPU computed."""
        self.link_slowdown = _observe(self.link, self.link_slowdown, nbytes, seconds, overlap)

    def work(self, nbytes: float, num_rows: int, few_rows: int) -> float:
        """What the CPU does for an expert with rows of activations, which it reads once for every
        `few_rows` of them: in bytes of experts with one row, that take as long."""
        passes = -(-num_rows // few_rows)
        return nbytes * (passes + (num_rows - passes) * self.row / self.cpu.per_byte)

    def cpu_seconds(self, nbytes: float, copying: float) -> float:
        """Of the CPU for `nbytes`, while copies run for the first `copying` seconds."""
        alone = self.cpu(nbytes)
        if copying >= alone * self.slowdown:
            return alone * self.slowdown
        return alone + copying * (1 - 1 / self.slowdown)

    def layer_seconds(
        self, hits: float, misses: Sequence[Miss], copied: int, wait: float = 0.0
    ) -> float:
        """Of a layer's experts, if the first `copied` misses are copied, the rest on the CPU.

        `hits` are bytes that are resident; the link is busy for the next `wait` seconds. Misses
        are in the order in which they are in RAM.
        """
        gpu = self.gpu(hits) if hits else 0.0
        if not misses:
            return gpu
        arrival = wait
        slowdown = self.link_slowdown if copied < len(misses) else 1.0
        for nbytes, ready, _ in misses[:copied]:
            arrival = max(arrival, ready) + slowdown * self.link(nbytes)
            gpu = max(gpu, arrival) + self.gpu(nbytes)
        if copied == len(misses):
            return gpu
        left = sum(miss.on_cpu for miss in misses[copied:])
        last = misses[-1]
        return max(
            gpu,
            self.cpu_seconds(left, arrival),
            last.ready + self.cpu(last.on_cpu) if last.ready else 0.0,
        )

    def balance(self, hits: float, misses: Sequence[Miss], wait: float = 0.0) -> int:
        """How many of the misses to copy, so that the layer ends soonest."""
        ends = self.ends(hits, misses, wait)
        return ends.index(min(ends))

    def ends(self, hits: float, misses: Sequence[Miss], wait: float = 0.0) -> list[float]:
        """Seconds of the layer if 0, 1, ... all of the misses are copied."""
        return [self.layer_seconds(hits, misses, n, wait) for n in range(len(misses) + 1)]


def _observe(line: Line, slowdown: float, nbytes: float, seconds: float, overlap: float) -> float:
    """What one of two that share the memory took tells of it alone (`line`) or, if the other was
    busy for a share of that time, of how much slower it is then: returns that."""
    if overlap < 0.1:
        line.observe(nbytes, seconds)
        return slowdown
    measured = max(1.0, 1 + (seconds / line(nbytes) - 1) / overlap)
    slowdown += 0.1 * (measured - slowdown)
    rest = (1 - overlap) + overlap * slowdown  # what of it is news about the line itself
    line.observe(nbytes, seconds / rest)
    return slowdown
