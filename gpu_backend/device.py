"""One torch device: its memory, its two streams, and how bytes get there.

Kernels run on the current stream; experts come over a stream of their own, which first waits for
the kernels that were launched before, because they may still read the slot that is overwritten.
On torch's "cpu" device the same calls copy at once.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from importlib.util import find_spec
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np
import torch

from gpu_backend.cuda_pinner import CudaPinner
from gpu_backend.kernel_times import KernelTimes


def cuda_is_available() -> bool:
    return torch.cuda.is_available()


def is_usable() -> bool:
    """Whether there is a CUDA device that our kernels run on."""
    return (
        cuda_is_available()
        and find_spec("triton") is not None
        and torch.cuda.get_device_capability() >= OLDEST
    )


def check_capability(name: str, capability: tuple[int, int]) -> None:
    """RuntimeError if a card is too old."""
    if capability < OLDEST:
        major, minor = capability
        raise RuntimeError(
            f"{name} has compute capability {major}.{minor}, and kernels need 7.5 (GeForce RTX 20, "
            "GTX 16, T4) at least: use --device cpu"
        )


def num_cards() -> int:
    """CUDA devices that torch finds."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def card_name(device: str) -> str:
    """What its maker calls a CUDA device; the names of others are as good."""
    card = torch.device(device)
    if card.type != "cuda" or (card.index or 0) >= num_cards():
        return device
    return str(torch.cuda.get_device_name(card))


RESERVE = 0.05  # of what is free: what the driver takes later
OLDEST = 7, 5  # compute capability of the cards that Triton and torch still know


class Staging(NamedTuple):
    """A pair of buffers that a blob passes on its way to a slot."""

    host: np.ndarray  # uint8, page-locked where that is possible
    device: torch.Tensor  # uint8


@contextmanager
def allocating(what: str, where: Any) -> Iterator[None]:
    """Turns torch's out-of-memory error into a MemoryError that says for what."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise MemoryError(f"{what} does not fit on {where}: {error}") from error


class TorchDevice:
    machine = None  # it is real: see gpu_backend.simulated
    lockable_bytes = None  # of RAM: only trying tells

    def __init__(self, name: str) -> None:
        self.torch_device = torch.device(name)
        self.is_cuda = self.torch_device.type == "cuda"
        self.capability = (0, 0)
        self.index = -1  # of a CUDA device
        if self.is_cuda:
            if not torch.cuda.is_available():
                raise RuntimeError(
                    "no CUDA device was found by torch: use --device cpu, or install a torch "
                    "built for this machine's driver"
                )
            self.index = self.torch_device.index or 0
            if self.index >= torch.cuda.device_count():
                raise RuntimeError(
                    f"there is no device {name!r}: torch finds {torch.cuda.device_count()} here, "
                    "which are counted from cuda:0"
                )
            self.torch_device = torch.device("cuda", self.index)
            self.capability = torch.cuda.get_device_capability(self.torch_device)
            check_capability(name, self.capability)
            self._copies = torch.cuda.Stream(self.torch_device)
            self._downloads = torch.cuda.Stream(self.torch_device)
            self._last_use = torch.cuda.Event()
        self._pinner: CudaPinner | None = None
        if self.is_cuda:
            self._pinner = CudaPinner(self.index, lambda: self.table(1))
        self.kernel_times = KernelTimes()
        self._lock = threading.Lock()  # marks come from the main thread, uploads from loaders

    def seconds(self, work: Callable[[], object]) -> float:
        """What it takes on the device; waits for it."""
        with self.timed(0, times := KernelTimes()):
            work()
        self.synchronize()
        ((_, seconds),) = times.take()
        return seconds

    @contextmanager
    def timed(self, nbytes: float, times: KernelTimes | None = None) -> Iterator[None]:
        """What is launched meanwhile reads `nbytes` of weights: told to `times`, or by
        `kernel_times`."""
        times = times or self.kernel_times
        if not self.is_cuda:
            start = perf_counter()
            yield
            seconds = perf_counter() - start
            times.add(nbytes, lambda: seconds)
            return
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        stream = torch.cuda.current_stream(self.torch_device)
        begin.record(stream)
        yield
        end.record(stream)
        times.add(nbytes, lambda: 1e-3 * begin.elapsed_time(end) if end.query() else None)

    @property
    def free_bytes(self) -> int | None:
        """Bytes that can still be allocated; None: not known."""
        if not self.is_cuda:
            return None
        free, _ = torch.cuda.mem_get_info(self.torch_device)
        cached = torch.cuda.memory_reserved(self.torch_device)
        return int(free + cached - torch.cuda.memory_allocated(self.torch_device))

    @property
    def usable_bytes(self) -> int | None:
        """What of that a model may take."""
        free = self.free_bytes
        return None if free is None else int(free * (1 - RESERVE))

    def allocating(self, what: str) -> AbstractContextManager[None]:
        return allocating(what, self.torch_device)

    def allocate(self, nbytes: int, what: str) -> torch.Tensor:
        """uint8 [nbytes] on the device. Raises MemoryError."""
        with self.allocating(f"{what} ({nbytes} bytes)"):
            return torch.empty(nbytes, dtype=torch.uint8, device=self.torch_device)

    def table(self, *shape: int) -> torch.Tensor:
        """int32 on the device, all -1."""
        return torch.full(shape, -1, dtype=torch.int32, device=self.torch_device)

    def staging(self, nbytes: int) -> Staging:
        host = torch.empty(nbytes, dtype=torch.uint8)
        if self.is_cuda:
            with suppress(RuntimeError):  # the limit of page-locked memory: slower, no more
                host = host.pin_memory()
        return Staging(host.numpy(), self.allocate(nbytes, "a staging buffer"))

    def download(self, x: torch.Tensor) -> np.ndarray:
        """A copy in RAM of what the host has already waited for; does not wait for later work."""
        with torch.cuda.stream(self._downloads) if self.is_cuda else nullcontext():
            return np.ascontiguousarray(x.detach().cpu().numpy())

    def synchronize(self) -> None:
        """Wait for the kernels that were launched until now."""
        if self.is_cuda:
            torch.cuda.current_stream(self.torch_device).synchronize()

    def mark(self) -> None:
        """Uploads from now on wait for the kernels that were launched until now."""
        if self.is_cuda:
            with self._lock:
                self._last_use.record(torch.cuda.current_stream(self.torch_device))

    def pin(self, address: int, nbytes: int) -> bool:
        """Let copies of this card, and of all others, read that memory where it is."""
        return self._pinner is None or self._pinner.pin(address, nbytes)

    def unpin(self, address: int) -> None:
        if self._pinner is not None:
            self._pinner.unpin(address)

    def upload(
        self,
        blob: np.ndarray,
        staging: Staging,
        nbytes: int,
        then: Callable[[torch.Tensor], None],
    ) -> Any:
        """Copy `nbytes` of a blob, then do `then(staging.device)`, on the copy stream.

        Returns what `wait` waits for; blob and staging must stay as they are until then.
        """
        # Whoever waits for it sleeps: the processor's cores have experts to compute meanwhile.
        ticket = torch.cuda.Event(blocking=True) if self.is_cuda else None
        host = torch.from_numpy(blob)[:nbytes]
        stream = torch.cuda.stream(self._copies) if self.is_cuda else nullcontext()
        with stream:
            if self.is_cuda:
                with self._lock:
                    self._copies.wait_event(self._last_use)
            staging.device[:nbytes].copy_(host, non_blocking=True)
            try:
                then(staging.device)
            except Exception:
                if self.is_cuda:  # nobody will wait for the copy, which reads the blob
                    self._copies.synchronize()
                raise
            return self._copies.record_event(ticket) if self.is_cuda else None

    def wait(self, ticket: Any) -> None:
        if ticket is not None:
            ticket.synchronize()

    def close(self) -> None:
        if self.is_cuda:
            torch.cuda.synchronize(self.torch_device)
