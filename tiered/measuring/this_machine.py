"""This machine, measured once and kept: what `tiered calibrate` finds, and `info` and `plan` use.

Two files in the user's cache folder: `machine.json` has the processor, its memory and a disk,
`gpu.json` what `gpu_backend.calibrate` says of each card.
"""

from __future__ import annotations

import json
import platform
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from tiered.backend import default_threads
from tiered.measuring.measure import measure_disk, scratch_file
from tiered.planning.hardware import GB, Gpu
from tiered.user_cache import gpu_file, machine_file, user_cache

MIB = 1 << 20
READ_SIZES = (64 << 10, 1 * MIB, 4 * MIB)  # small experts to large ones
SCRATCH_MIB = 256
Progress = Callable[[str], None]


@dataclass(frozen=True)
class HostSpeed:
    """The processor, its memory and one disk. GB are 10^9 bytes, operations 8-bit integer ones."""

    node: str  # this machine's name: a home folder may be shared with others
    processor: str
    isa: str
    measured: str  # date and time, ISO 8601
    bandwidth_gb_s: dict[int, float]  # of reads, by number of threads
    peak_gops: dict[int, float]
    disk_folder: str
    disk_gb_s: dict[int, float]  # of parallel direct reads, by bytes of each
    disk_latency_us: float


def measure_host(
    disk_folder: Path, threads: int | None = None, progress: Progress = lambda text: None
) -> HostSpeed:
    """Measure, in about ten seconds. Writes a file of some hundred MB to `disk_folder`, and removes
    it; OSError if it cannot."""
    from cpu_kernels.bandwidth import read_bandwidth
    from cpu_kernels.isa import choose
    from cpu_kernels.peak import product_peak

    counts = sorted({1, threads or default_threads()})
    progress("memory")
    bandwidth = {count: read_bandwidth(count) / GB for count in counts}
    progress("arithmetic")
    peak = {count: product_peak(count) / 1e9 for count in counts}
    progress("disk")
    with scratch_file(disk_folder, SCRATCH_MIB) as file:
        disks = {nbytes: measure_disk(file, nbytes) for nbytes in READ_SIZES}
    return HostSpeed(
        platform.node(), processor_name(), choose("auto").name,
        datetime.now().astimezone().isoformat(timespec="seconds"), bandwidth, peak,
        str(disk_folder.resolve()), {size: disk.bandwidth for size, disk in disks.items()},
        min(disk.latency for disk in disks.values()),
    )  # fmt: skip


def processor_name() -> str:
    """As its maker calls it, where the system says that."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith(("model name", "Hardware")):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def save_host(speed: HostSpeed) -> None:
    """Keep it in place of an older one: complete, or not at all."""
    user_cache().mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(
        "w", dir=user_cache(), prefix="machine-", suffix=".json", delete=False, encoding="utf-8"
    ) as file:
        json.dump(asdict(speed), file, indent=2)
    Path(file.name).replace(machine_file())


def known_host() -> HostSpeed | None:
    """What was measured here; None: nothing yet, or on another machine, or an unreadable file."""
    try:
        values = json.loads(machine_file().read_text(encoding="utf-8"))
        for name in ("bandwidth_gb_s", "peak_gops", "disk_gb_s"):
            values[name] = {int(key): float(value) for key, value in values[name].items()}
        speed = HostSpeed(**values)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return speed if (speed.node, speed.processor) == (platform.node(), processor_name()) else None


def known_gpus() -> dict[str, dict[str, Any]]:
    """What was measured of the cards that were in this machine then, as "cuda:0" (see
    gpu_backend.calibrate)."""
    known = {}
    try:
        stored = json.loads(gpu_file().read_text(encoding="utf-8")).items()
    except (OSError, ValueError, AttributeError):
        return {}
    for name, values in stored:
        with suppress(KeyError, TypeError, ValueError, IndexError):
            described_gpu(values)
            known[name] = values
    return known if known_host() is not None else {}


def host_facts(speed: HostSpeed) -> dict[str, Any]:
    """What people want to know of it; names end with the unit."""
    return {
        "measured": speed.measured,
        "processor": speed.processor,
        "memory_gb_s": _by_threads(speed.bandwidth_gb_s),
        "arithmetic_gops": _by_threads(speed.peak_gops),
        "disk_folder": speed.disk_folder,
        "disk_gb_s": {
            f"in reads of {nbytes >> 10} KiB": rate for nbytes, rate in speed.disk_gb_s.items()
        },
        "disk_latency_usec": speed.disk_latency_us,
    }


def _by_threads(values: dict[int, float]) -> dict[str, float]:
    return {f"with {count} thread{'s'[: count != 1]}": rate for count, rate in values.items()}


def gpu_facts(values: dict[str, Any]) -> dict[str, Any]:
    """The same of a card, from what `gpu_backend.calibrate` stored."""

    def speed(name: str) -> float:
        nbytes, seconds = values[name][-1]
        return float(nbytes / seconds / GB)

    return {
        "gpu": values["device"],
        "vram_bytes": values["vram"],
        "vram_gb_s": values["memory"] / GB,
        "gpu_tflops": values["compute"] / 1e12,
        "link_gb_s": {
            "alone": speed("link"),
            "while the processor reads memory": speed("link_competing"),
            "from memory that is not page-locked": speed("link_pageable"),
        },
        "link_latency_usec": values["link"][0][1] * 1e6,
        "launch_usec": values["launch"] * 1e6,
        "synchronize_usec": values["synchronize"] * 1e6,
        "page_lockable_bytes": values["pin_limit"],
    }


def gpus_facts(cards: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The same of several, which are told apart by where they are."""
    if len(cards) == 1:
        return gpu_facts(*cards.values())
    return {
        f"{where}_{name}": value
        for where, values in cards.items()
        for name, value in gpu_facts(values).items()
    }


def described_gpu(values: dict[str, Any]) -> Gpu:
    """A measured card as a forecast wants it. Its link's speed is that of large copies."""
    nbytes, seconds = values["link"][-1]
    return Gpu(
        vram=int(values["vram"]),
        bandwidth=values["memory"] / GB,
        link=nbytes / seconds / GB,
        compute=values["compute"] / 1e12,
        copy_latency=values["link"][0][1] * 1e6,
        launch=values["launch"] * 1e6,
        sync=values["synchronize"] * 1e6,
    )
