"""A described machine as a live engine meets it: what each piece of its work takes there."""

from __future__ import annotations

import math

from tiered.planning.hardware import GB, Hardware
from tiered.planning.machine import Machine, Rates


class LiveMachine(Machine):
    """The queues and rates that forecasts use, and what many rows of activations take.

    `gpu_flops` and `cpu_flops`: operations per second of matrix products.
    """

    def __init__(
        self, rates: Rates, gpu_flops: float = math.inf, cpu_flops: float = math.inf
    ) -> None:
        super().__init__(rates)
        self._gpu_flops, self._cpu_flops = gpu_flops, cpu_flops

    @classmethod
    def of(cls, hardware: Hardware) -> LiveMachine:
        """A description with a GPU."""
        gpu = hardware.gpu
        assert gpu is not None
        flops = gpu.compute * 1e12 * gpu.compute_efficiency
        return cls(Rates.of(hardware), flops, hardware.host.compute * GB)

    def product_seconds(self, nbytes: float, operations: float, launches: int) -> float:
        """Of the GPU, to read `nbytes` of weights, keys and values, and compute with them."""
        reading = nbytes / self.rates.dense
        return max(reading, operations / self._gpu_flops) + launches * self.rates.launch

    def host_end(self, nbytes: float, operations: float, start: float) -> float:
        """When the processor, starting then, is done with experts."""
        begin = start + self.rates.wake
        return max(self.cpu_end(nbytes, begin), begin + operations / self._cpu_flops)
