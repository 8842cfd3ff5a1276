"""What this machine's GPU and link can do: measured once, in seconds, for `tiered calibrate`.

Every number is the median of a few runs of a `Probe`, so the same code measures a CUDA device and,
in tests, one whose speeds are known. Nothing here is used to decide a result, only when and where.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any, Protocol

LINK_SIZES = tuple(1 << shift for shift in (16, 18, 20, 22, 24, 26))  # 64 KiB ... 64 MiB
MEMORY_BYTES = 256 << 20
MATRIX_SIZE = 4096
REPEATS = 5


class Probe(Protocol):
    """Does one thing and says how many seconds it took."""

    def read_memory(self, nbytes: int) -> float:
        """Read `nbytes` of the device's memory once."""

    def copy(self, nbytes: int, pinned: bool, competing: bool) -> float:
        """Copy from the host; `competing`: while the processor reads the same DRAM."""

    def multiply(self, size: int) -> float:
        """A product of two 16-bit matrices [size, size]."""

    def launch(self) -> float:
        """An empty kernel, launched in a row of many."""

    def synchronize(self) -> float:
        """Until the host knows that an empty kernel has ended."""

    def pin_limit(self) -> int:
        """Bytes that can be page-locked: see gpu_backend.pinning."""


@dataclass(frozen=True)
class Calibration:
    """Bytes, operations per second, and seconds. `link` has (bytes, seconds) of single copies."""

    device: str
    vram: int
    memory: float  # bytes per second
    compute: float  # operations per second of 16-bit matrix products
    link: tuple[tuple[int, float], ...]
    link_competing: tuple[tuple[int, float], ...]
    link_pageable: tuple[tuple[int, float], ...]
    launch: float
    synchronize: float
    pin_limit: int


def calibrate(probe: Probe, device: str, vram: int) -> Calibration:
    """Measure everything; a few hundred MB are moved."""

    def typical(measure: Callable[[], float]) -> float:
        measure()  # the first time, things are compiled, allocated and woken up
        return median(measure() for _ in range(REPEATS))

    def copies(pinned: bool, competing: bool) -> tuple[tuple[int, float], ...]:
        return tuple(
            (size, typical(lambda size=size: probe.copy(size, pinned, competing)))  # type: ignore[misc]
            for size in LINK_SIZES
        )

    return Calibration(
        device=device,
        vram=vram,
        compute=2 * MATRIX_SIZE**3 / typical(lambda: probe.multiply(MATRIX_SIZE)),
        memory=MEMORY_BYTES / typical(lambda: probe.read_memory(MEMORY_BYTES)),
        link=copies(True, False),
        link_competing=copies(True, True),
        link_pageable=copies(False, False),
        launch=typical(probe.launch),
        synchronize=typical(probe.synchronize),
        pin_limit=probe.pin_limit(),
    )


def save(file: Path, where: str, calibration: Calibration) -> None:
    """Add to a file of several cards, or replace there, what is at `where` ("cuda:0"). Written to a
    new file first: a crash leaves the old one."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(".new")
    known = {**_stored(file), where: asdict(calibration)}
    temporary.write_text(json.dumps(known, indent=2) + "\n")
    temporary.replace(file)


def _stored(file: Path) -> dict[str, Any]:
    try:
        values = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}
