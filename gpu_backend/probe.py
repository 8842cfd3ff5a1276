"""Measures a CUDA device for gpu_backend.calibrate. Needs one."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import psutil
import torch

from gpu_backend.pinning import Arena, probe_limit

LAUNCHES = 200
LARGEST_PIN = 64 << 30  # bytes that the probe may try


class CudaPinner:
    """Registers ranges of memory with CUDA."""

    def __init__(self) -> None:
        self._runtime = torch.cuda.cudart()

    def pin(self, address: int, nbytes: int) -> bool:
        refused: bool = int(self._runtime.cudaHostRegister(address, nbytes, 0)) != 0
        return not refused

    def unpin(self, address: int) -> None:
        self._runtime.cudaHostUnregister(address)


class CudaProbe:
    """See gpu_backend.calibrate.Probe."""

    def __init__(self, device: str = "cuda", host_bytes: int = 256 << 20) -> None:
        self._device = torch.device(device)
        self._pageable = torch.ones(host_bytes, dtype=torch.uint8)
        self._pinned = self._pageable.pin_memory()
        self._target = torch.empty(host_bytes, dtype=torch.uint8, device=self._device)
        self._small = torch.zeros(1, device=self._device)

    def read_memory(self, nbytes: int) -> float:
        data = torch.ones(nbytes // 4, device=self._device)
        return self._seconds(lambda: data.sum())

    def copy(self, nbytes: int, pinned: bool, competing: bool) -> float:
        source = (self._pinned if pinned else self._pageable)[:nbytes]
        target = self._target[:nbytes]
        with _busy_processor() if competing else _idle():
            return self._seconds(lambda: target.copy_(source, non_blocking=True))

    def launch(self) -> float:
        def many() -> None:
            for _ in range(LAUNCHES):
                self._small.add_(1)

        return self._seconds(many) / LAUNCHES

    def synchronize(self) -> float:
        torch.cuda.synchronize(self._device)
        begin = time.perf_counter()
        self._small.add_(1)
        torch.cuda.synchronize(self._device)
        return time.perf_counter() - begin

    def pin_limit(self) -> int:
        """Tries at most half of the RAM that is free: locking memory makes it real."""
        size = min(LARGEST_PIN, psutil.virtual_memory().available // 2)
        arena = np.empty(size, np.uint8)
        return probe_limit(CudaPinner(), Arena(int(arena.ctypes.data), size))

    def _seconds(self, work: Callable[[], object]) -> float:
        """Of the device, between two events."""
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) * 1e-3


@contextmanager
def _idle() -> Iterator[None]:
    yield


@contextmanager
def _busy_processor() -> Iterator[None]:
    """A thread that reads memory larger than any cache, all the time."""
    data, stop = np.ones(64 << 20, np.int64), threading.Event()

    def read() -> None:
        while not stop.is_set():
            data.sum()

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
