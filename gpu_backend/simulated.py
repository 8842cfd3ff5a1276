"""GPUs that every machine has: their memory is RAM that only they may touch, their time is virtual.

Copies run on one FIFO stream, kernels on another. A copy's bytes arrive when the virtual clock
reaches its end; whoever reads a slot before that, or overwrites one that a kernel still reads, gets
a RuntimeError. Arithmetic is the CPU's, so a model says bit by bit what it says without a GPU.
Needs neither torch nor triton.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, Protocol

import numpy as np
import psutil

from gpu_backend.cards import Cards
from gpu_backend.kernel_times import KernelTimes
from gpu_backend.kv_shapes import KVShape, kv_shapes
from gpu_backend.pieces import in_pieces
from gpu_backend.slots import ON_DEVICE, GpuSlots

ATTENTION_LAUNCHES, EXPERT_LAUNCHES, FEED_FORWARD_LAUNCHES = 6, 2, 3


class Clock(Protocol):
    """Virtual time: see tiered.simulated.clock."""

    @property
    def now(self) -> float: ...

    def at(self, time: float, effect: Callable[[], None]) -> None: ...

    def advance_to(self, time: float) -> None: ...


class Machine(Protocol):
    """Seconds that things take: see tiered.simulated.machine and tiered.planning.machine."""

    rates: Any
    staged: float  # share of the bytes copied now that passes a buffer in RAM
    link_free: float  # when the last copy so far has arrived

    def copy(self, nbytes: int, start: float) -> float:
        """When a copy has arrived that begins then, or after those before it."""

    def product_seconds(self, nbytes: float, operations: float, launches: int) -> float: ...

    def host_end(self, nbytes: float, operations: float, start: float) -> float: ...


class Staging(NamedTuple):
    host: np.ndarray
    device: np.ndarray


class Stream:
    """First in, first out: work begins when what was given before has ended."""

    def __init__(self) -> None:
        self.end = 0.0

    def run(self, seconds: float, now: float) -> tuple[float, float]:
        begin = max(now, self.end)
        self.end = begin + seconds
        return begin, self.end


class SimulatedGpu:
    """The device: what gpu_backend.device.TorchDevice is to CUDA. Thread-safe.

    `memory` in bytes; None: as much as is wanted. `kernels`: of cards that follow each other, one
    stream; `locked`: of cards of one host, what is page-locked: bytes by address, of which
    `lockable_bytes` are allowed. `fail_copies` and `fail_pins`: numbers of the copies, and of the
    ranges to be locked, that fail, counted from 0.
    """

    def __init__(
        self,
        machine: Machine,
        clock: Clock,
        memory: int | None = None,
        kernels: Stream | None = None,
        fail_copies: Collection[int] = (),
        lockable_bytes: int | None = None,
        locked: dict[int, int] | None = None,
        fail_pins: Collection[int] = (),
    ) -> None:
        self.machine, self.clock, self.free_bytes = machine, clock, memory
        self.kernels = kernels or Stream()
        self.kernel_times = KernelTimes()
        self.lock = threading.RLock()
        self.fail_copies = set(fail_copies)
        self.num_copies = self.num_pins = 0
        self.lockable_bytes = lockable_bytes
        self.locked = {} if locked is None else locked
        self.fail_pins = fail_pins
        self.marked = 0.0
        self.synchronizes = True  # False: forgets to let copies wait for kernels (a bug to find)
        self.in_flight: dict[int, float] = {}  # slot -> when its bytes arrive
        self.readers: dict[int, float] = {}  # slot -> until when a kernel reads it

    @property
    def usable_bytes(self) -> int | None:
        """All of it: descriptions tell separately what drivers take."""
        return self.free_bytes

    # -- what GpuSlots uses --

    def allocate(self, nbytes: int, what: str) -> np.ndarray:
        """uint8 [nbytes]. Raises MemoryError."""
        if self.free_bytes is not None:
            if nbytes > self.free_bytes:
                raise MemoryError(f"{what} takes {nbytes} bytes, and {self.free_bytes} are free")
            self.free_bytes -= nbytes
        free = psutil.virtual_memory().available
        if nbytes > free:  # to be touched later, when nobody could say so any more
            raise MemoryError(
                f"{what} of a simulated card take {nbytes >> 20} MiB of RAM, and {free >> 20} MiB "
                "are free: give a smaller --vram"
            )
        return np.zeros(nbytes, np.uint8)

    def table(self, *shape: int) -> np.ndarray:
        return np.full(shape, -1, np.int32)

    def staging(self, nbytes: int) -> Staging:
        return Staging(np.zeros(nbytes, np.uint8), self.allocate(nbytes, "a staging buffer"))

    def mark(self) -> None:
        with self.lock:
            self.marked = self.kernels.end

    def pin(self, address: int, nbytes: int) -> bool:
        number, self.num_pins = self.num_pins, self.num_pins + 1
        if number in self.fail_pins:
            return False
        self.locked[address] = nbytes
        return True

    def unpin(self, address: int) -> None:
        del self.locked[address]

    def upload(self, blob: np.ndarray, staging: Staging, nbytes: int, then: Any) -> float:
        """`then` is a partial function that knows its `slot`."""
        is_staged = blob is staging.host
        if not is_staged and not self._is_locked(blob.ctypes.data, nbytes):
            raise RuntimeError("a copy from memory that is not page-locked, or not in one piece")
        with self.lock:
            number, self.num_copies = self.num_copies, self.num_copies + 1
            if number in self.fail_copies:
                raise RuntimeError("the copy was aborted")
            after = self.marked if self.synchronizes else 0.0
            begin = max(self.clock.now, after, self.machine.link_free)
            self.machine.staged = float(is_staged)
            end = self.machine.copy(nbytes, begin)
            slot = then.keywords["slot"]
            if self.readers.get(slot, 0.0) > begin:
                raise RuntimeError(f"race: slot {slot} is overwritten while a kernel reads it")
            self.in_flight[slot] = end
            sent = blob[:nbytes].copy()

            def arrive() -> None:
                staging.device[:nbytes] = sent
                then(staging.device)
                del self.in_flight[slot]

            self.clock.at(end, arrive)
            return end

    def _is_locked(self, address: int, nbytes: int) -> bool:
        ends = address, address + nbytes
        return any(at <= ends[0] and ends[1] <= at + size for at, size in self.locked.items())

    def wait(self, ticket: float) -> None:
        with self.lock:
            self.clock.advance_to(ticket)

    # -- what a backend uses --

    def kernel(
        self, nbytes: float, operations: float, launches: int = 1, slots: Sequence[int] = ()
    ) -> tuple[float, float]:
        """Launch something that reads these slots, among other things: when it begins and ends."""
        with self.lock:
            seconds = self.machine.product_seconds(nbytes, operations, launches)
            begin, end = self.kernels.run(seconds, self.clock.now)
            for slot in slots:
                if slot in self.in_flight:
                    raise RuntimeError(f"race: slot {slot} is read before its copy has ended")
                self.readers[slot] = end
            return begin, end

    def host_works(self, nbytes: float, operations: float) -> None:
        """The processor computes beside the card."""
        with self.lock:
            self.clock.advance_to(self.machine.host_end(nbytes, operations, self.clock.now))

    def synchronize(self) -> None:
        """Until the host knows that everything launched so far has ended."""
        with self.lock:
            self.clock.advance_to(self.kernels.end + self.machine.rates.sync)

    def close(self) -> None:
        with self.lock:
            self.clock.advance_to(max(self.kernels.end, self.machine.link_free))


def keep_blocks(blob: Any, target: Any, format: str, num_blocks: int) -> None:
    """In place of the rearrangement: CPU kernels read blocks as files have them."""
    target[:] = blob[: len(target)]


class Weighed(NamedTuple):
    """A layer as the host prepared it, and what it takes to compute."""

    of_host: Any
    nbytes: int
    values: int  # weights: each is multiplied with each row of activations
    width: int = 0  # of an attention layer's queries, all heads together
    kept: KVShape | None = None  # what it keeps of each token


class WeighedExperts(NamedTuple):
    """The same of a layer's experts: `nbytes` of each, and `values` of one."""

    of_host: Any
    nbytes: np.ndarray  # int64 [num_experts]
    values: int


def weighed(of_host: Any, *weights: Any, **more: Any) -> Weighed:
    """`weights` are matrices, or tuples of matrices and vectors."""
    parts = [part for group in weights for part in (group if isinstance(group, tuple) else [group])]
    arrays = [part.data if hasattr(part, "format") else part for part in parts]
    nbytes = sum(array.nbytes for array in arrays if isinstance(array, np.ndarray))
    values = sum(part.shape[0] * part.shape[1] for part in parts if hasattr(part, "format"))
    return Weighed(of_host, nbytes, values, **more)


class SimulatedCard:
    """A card's part of a decoder: `host`, a CpuBackend, computes what is asked of it, and it takes
    the card's time. An expert that is in no slot of it is the host's own work."""

    finds_experts = False

    def __init__(self, host: Any, device: SimulatedGpu) -> None:
        self.host, self.device = host, device
        self.computed = {"gpu": 0, "cpu": 0}  # experts

    def __getattr__(self, name: str) -> Any:
        return getattr(self.host, name)

    def of_layer(self, index: int) -> SimulatedCard:
        return self

    def chain(self, num_tokens: int, layers: Any) -> AbstractContextManager[None]:
        return nullcontext()  # each call's time is counted when it is made

    def again(self, layers: Any, table: Any, batch: Any, kv: Any, scale: float = 1.0) -> None:
        """Never: as above."""

    def chained_seconds(self) -> dict[str, float]:
        return {}

    def slots(
        self, space: Any, layouts: dict[int, Any], num_experts: int, nbytes: int = 0
    ) -> GpuSlots:
        """Keys and values that take a part of it are only counted: they lie in RAM."""
        self._slots = GpuSlots(self.device, space, layouts, keep_blocks, num_experts, nbytes)
        return self._slots

    # -- layers, prepared once --

    def attention_layer(self, weights: Any, config: Any, index: int = 0) -> Weighed:
        layer = self.host.attention_layer(weights, config, index)
        return weighed(layer, weights, width=weights.q.shape[0], kept=kv_shapes(config)[index])

    def latent_attention_layer(self, weights: Any, config: Any, index: int = 0) -> Weighed:
        layer = self.host.latent_attention_layer(weights, config, index)
        return weighed(layer, weights, width=weights.q.shape[0], kept=kv_shapes(config)[index])

    def delta_layer(self, weights: Any, config: Any, number: int) -> Weighed:
        return weighed(self.host.delta_layer(weights, config, number), weights)

    def conv_layer(self, weights: Any, config: Any, number: int) -> Weighed:
        return weighed(self.host.conv_layer(weights, config, number), weights)

    def mamba2_layer(self, weights: Any, config: Any, number: int) -> Weighed:
        return weighed(self.host.mamba2_layer(weights, config, number), weights)

    def router_layer(self, weights: Any, config: Any) -> Weighed:
        return weighed(self.host.router_layer(weights, config), weights)

    def expert_layer(
        self,
        layout: Any,
        config: Any,
        biases: Any = None,
        others: Sequence[Any] = (),
        kinds: np.ndarray | None = None,
    ) -> WeighedExperts:
        values = sum(matrix.shape[0] * matrix.shape[1] for matrix in layout)
        mix = (others, kinds) if others else ()
        each = np.array([one.nbytes for one in (layout, *others)])
        nbytes = each[np.zeros(config.num_experts, int) if kinds is None else kinds]
        return WeighedExperts(self.host.expert_layer(layout, config, biases, *mix), nbytes, values)

    def feed_forward_layer(self, weights: Any, config: Any, norm: Any = None) -> Weighed:
        return weighed(self.host.feed_forward_layer(weights, config, norm), weights)

    def join_layer(self, weights: Any, config: Any) -> Weighed:
        return weighed(self.host.join_layer(weights, config), weights)

    def output_layer(self, norm: np.ndarray, head: Any, config: Any) -> Weighed:
        return weighed(self.host.output_layer(norm, head, config), head)

    # -- a forward pass --

    def attention(self, x: Any, layer: Weighed, kv: Any, index: int, batch: Any) -> None:
        self.host.attention(x, layer.of_host, kv, index, batch)
        seen = batch.positions.astype(np.int64) + 1
        operations = 2 * len(seen) * layer.values + 4 * layer.width * int(seen.sum())
        kept = 0
        if layer.kept is not None:
            lengths = np.zeros(len(batch.page_tables), np.int64)
            np.maximum.at(lengths, batch.sequences, seen)
            kept = layer.kept.token_bytes(kv.dtype) * int(lengths.sum())
        self.device.kernel(layer.nbytes + kept, operations, ATTENTION_LAUNCHES)

    def route(self, x: Any, layer: Weighed) -> tuple[Any, Any]:
        h, routing = self.host.route(x, layer.of_host)
        self.device.kernel(layer.nbytes, 2 * len(x) * layer.values)
        self.device.synchronize()
        return h, routing

    def guess(self, x: Any, h: Any, layer: Weighed) -> Any:
        return self.host.guess(x, h, layer.of_host)

    def experts(
        self, h: Any, layer: WeighedExperts, addresses: np.ndarray, jobs: Any, out: Any
    ) -> None:
        here = addresses[:, 0] >= ON_DEVICE
        if here.any() and not here.all():
            raise ValueError("experts in slots and experts in RAM need a call each")
        operations = 2 * int(jobs.starts[-1] - jobs.starts[0]) * layer.values
        self.computed["gpu" if here.any() else "cpu"] += len(addresses)
        if here.any():
            slots = ((addresses[:, 0] - ON_DEVICE) // self._slots.stride).tolist()
            nbytes = int(layer.nbytes[jobs.experts].sum())
            begin, end = self.device.kernel(nbytes, operations, EXPERT_LAUNCHES, slots)
            if len(h) <= self.host.few_rows:  # as gpu_backend.backend has it
                clock = self.device.clock
                self.device.kernel_times.add(
                    nbytes, lambda: end - begin if clock.now >= end else None
                )
            addresses = addresses - ON_DEVICE + self._slots.slab.ctypes.data
        pieces, jobs = in_pieces(addresses, jobs, self.host.few_rows)
        self.host.experts(h, layer.of_host, pieces, jobs, out)
        if here.any():
            self.device.mark()
        else:
            self.device.host_works(int(layer.nbytes[jobs.experts].sum()), operations)

    def host_seconds(self, layer: WeighedExperts, layout: Any, num_rows: int) -> float:
        """What an expert with so many rows takes on the described host."""
        machine = self.device.machine
        return machine.host_end(layout.nbytes, 2 * num_rows * layer.values, 0.0)

    def combine(self, x: Any, out: Any, weights: np.ndarray) -> None:
        self.host.combine(x, out, weights)
        self.device.kernel(0, 0)

    def feed_forward(self, x: Any, h: Any, layer: Weighed, into: Any = None) -> None:
        self.host.feed_forward(x, h, layer.of_host, into)
        self.device.kernel(layer.nbytes, 2 * len(x) * layer.values, FEED_FORWARD_LAUNCHES)

    def join(self, x: Any, hidden: np.ndarray, layer: Weighed) -> None:
        self.host.join(x, hidden, layer.of_host)
        self.device.kernel(layer.nbytes, 2 * len(x) * layer.values, FEED_FORWARD_LAUNCHES)

    def head(self, x: Any, rows: np.ndarray, layer: Weighed) -> np.ndarray:
        logits: np.ndarray = self.host.head(x, rows, layer.of_host)
        self.device.kernel(layer.nbytes, 2 * len(rows) * layer.values)
        self.device.synchronize()
        return logits

    def facts(self) -> dict[str, Any]:
        """What is known of the card only while it runs, for people."""
        return {"copies": self.device.num_copies}

    def close(self) -> None:
        self.device.close()


class SimulatedCards(Cards):
    """One simulated card or several, on one clock, whose host computes for all of them. `timing` is
    a tiered.simulated.timing.Timing."""

    def __init__(
        self, cards: Sequence[SimulatedCard], names: Sequence[str], host: Any, timing: Any
    ) -> None:
        super().__init__(cards, names)
        self._host, self.timing = host, timing

    def __getattr__(self, name: str) -> Any:
        return getattr(self._host, name)

    def close(self) -> None:
        super().close()
        self._host.close()
