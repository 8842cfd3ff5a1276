"""A simulated GPU of given speeds: see gpu_backend.simulated, which all of it is."""

from gpu_backend.simulated import SimulatedCard, SimulatedGpu
from tiered.planning.machine import Rates
from tiered.simulated.clock import VirtualClock
from tiered.simulated.machine import LiveMachine


def rates(link=10e9, bandwidth=100e9, latency=1e-5, cpu=40e9, disk=1e9):
    """Bytes per second, but for `latency`, which is the copies'; nothing else takes time."""
    return Rates(
        dense=bandwidth, head=bandwidth, gpu=bandwidth, cpu=cpu, cpu_copying=cpu, link=link,
        copy_latency=latency, disk=disk, disk_latency=0.0, wake=0.0,
    )  # fmt: skip


def fake_gpu(vram=1 << 30, fail_copies=(), **speeds):
    machine = LiveMachine(rates(**speeds))
    return SimulatedGpu(machine, VirtualClock(), vram, fail_copies=fail_copies)


class FakeCard(SimulatedCard):
    """The only card of an engine, which closes the host, too."""

    def close(self):
        super().close()
        self.host.close()


class FakePinner:
    """A system that locks `limit` bytes, and remembers what is locked."""

    def __init__(self, limit):
        self.limit = limit
        self.pinned = {}
        self.refusals = 0

    def pin(self, address, nbytes):
        if sum(self.pinned.values()) + nbytes > self.limit:
            self.refusals += 1
            return False
        assert address not in self.pinned
        self.pinned[address] = nbytes
        return True

    def unpin(self, address):
        del self.pinned[address]
