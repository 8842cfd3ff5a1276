"""Measures a CUDA device for gpu_backend.calibrate. Needs one."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from triton import TritonError

from cpu_kernels.formats import FORMATS
from gpu_backend.arrays import Quantized
from gpu_backend.calibrate import LINK_SIZES, calibrate, save
from gpu_backend.cuda_pinner import CudaPinner
from gpu_backend.device import TorchDevice, card_name
from gpu_backend.launch import Launcher
from gpu_backend.pinning import Arena, probe_limit
from gpu_backend.tuning import Tuning, find_tuning, load_tuning, save_tuning

LAUNCHES = 200
EXPERT_SHAPE = (14336, 4096)
LARGEST_PIN = 64 << 30  # bytes that the probe may try


def calibrate_card(device: str, file: Path, tuning_file: Path) -> dict[str, Any]:
    """Measure a CUDA device ("cuda:0"), keep that in `file` and the best tuning in
    `tuning_file`. RuntimeError: there is none, or it is too old."""
    probe, name = CudaProbe(device), card_name(device)
    vram = torch.cuda.get_device_properties(torch.device(device)).total_memory
    measured = calibrate(probe, name, int(vram))
    save(file, device, measured)
    Launcher(index=torch.device(device).index or 0).try_out(torch.device(device))
    tuning = find_tuning(probe.decode, probe.prefill, load_tuning(tuning_file, name))
    save_tuning(tuning_file, name, tuning)
    return asdict(measured)


class CudaProbe:
    """See gpu_backend.calibrate.Probe."""

    def __init__(self, device: str) -> None:
        card = TorchDevice(device)
        self._seconds, self._device = card.seconds, card.torch_device
        torch.cuda.set_device(self._device)  # whose streams events and copies belong to
        self._pageable = torch.ones(LINK_SIZES[-1], dtype=torch.uint8)
        self._pinned = self._pageable.pin_memory()
        self._target = torch.empty(LINK_SIZES[-1], dtype=torch.uint8, device=self._device)
        self._small = torch.zeros(1, device=self._device)

    def read_memory(self, nbytes: int) -> float:
        data = torch.ones(nbytes // 4, device=self._device)
        return self._seconds(lambda: data.sum())

    def copy(self, nbytes: int, pinned: bool, competing: bool) -> float:
        source = (self._pinned if pinned else self._pageable)[:nbytes]
        target = self._target[:nbytes]
        with _busy_processor() if competing else _idle():
            return self._seconds(lambda: target.copy_(source, non_blocking=True))

    def multiply(self, size: int) -> float:
        a = torch.ones(size, size, dtype=torch.float16, device=self._device)
        return self._seconds(lambda: a @ a)

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
        pinner = CudaPinner(self._device.index or 0, lambda: self._small.add_(1))
        return probe_limit(pinner, Arena(int(arena.ctypes.data), size))

    def decode(self, tuning: Tuning) -> float:
        """A 4-bit matrix as large as an expert's of Mixtral, with one row of activations."""
        return self._product(tuning, 1)

    def prefill(self, tuning: Tuning) -> float:
        """The same, with a prompt's rows."""
        return self._product(tuning, 256)

    def _product(self, tuning: Tuning, num_rows: int) -> float:
        capability = torch.cuda.get_device_capability(self._device)
        launcher = Launcher(tuning, capability, self._device.index or 0)
        a = launcher.quantize(torch.ones(num_rows, EXPERT_SHAPE[1], device=self._device))
        try:
            launcher.linear(a, self._matrix)  # compiled now
        except TritonError as error:  # registers or shared memory do not suffice
            raise RuntimeError(str(error)) from error
        return min(self._seconds(lambda: launcher.linear(a, self._matrix)) for _ in range(5))

    @cached_property
    def _matrix(self) -> Quantized:
        nbytes = EXPERT_SHAPE[0] * FORMATS["q4_0"].row_bytes(EXPERT_SHAPE[1])
        data = torch.full((nbytes,), 1, dtype=torch.uint8, device=self._device)
        return Quantized(data, "q4_0", EXPERT_SHAPE)


@contextmanager
def _idle() -> Iterator[None]:
    yield


@contextmanager
def _busy_processor() -> Iterator[None]:
    """A thread per core that reads memory larger than any cache, all the time, as experts are."""
    data, stop = np.ones(64 << 20, np.int64), threading.Event()

    def read() -> None:
        while not stop.is_set():
            data.sum()

    cores = psutil.cpu_count(logical=False) or 1
    threads = [threading.Thread(target=read, daemon=True) for _ in range(cores)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join()
