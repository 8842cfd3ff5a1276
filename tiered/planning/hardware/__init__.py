"""Hardware descriptions: TOML files that say how fast a machine's parts are.

Those in this folder ship with the package; a user's own file works the same way. A description is
what a forecast is made from, never a measurement of anything.
"""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from dataclasses import MISSING, asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from tiered.memory import parse_bytes

GB = 1e9
SIZES = ("vram", "reserved", "ram")  # bytes, or text such as "16G"


@dataclass(frozen=True)
class Gpu:
    """A graphics card and its link. GB are 10^9 bytes; sizes as text are powers of 1024."""

    vram: int  # bytes
    bandwidth: float  # GB/s of its memory, as specified
    link: float  # GB/s from host to card, as reached
    compute: float  # TFLOP/s of 16-bit matrix products, as specified
    efficiency: float = 0.8  # of the bandwidth, reached by decode kernels
    compute_efficiency: float = 0.4  # of the compute, reached in prefill
    copy_latency: float = 12.0  # µs before the first byte of a copy
    launch: float = 1.0  # µs of each kernel, launched in a graph
    sync: float = 15.0  # µs until the host knows what the router chose
    reserved: int = 1_200_000_000  # bytes that the driver, the context and workspace take
    # Cards like this, each with some of the layers: a token passes one after the other, so they
    # have the memory of all and the speed of one.
    count: int = 1

    @property
    def room(self) -> int:
        """Bytes for a model, on all cards."""
        return self.count * (self.vram - self.reserved)


def in_turn(cards: Sequence[Gpu]) -> Gpu:
    """Cards that have some of the layers each, in proportion to memory, and of which a token passes
    one after the other: as one that has the memory of all and takes as long."""
    rooms = [max(0, card.room) for card in cards]
    shares = [room / sum(rooms) if sum(rooms) else 1 / len(rooms) for room in rooms]

    def rate(values: Sequence[float]) -> float:
        return 1 / sum(share / value for share, value in zip(shares, values, strict=True))

    def mean(values: Sequence[float]) -> float:
        return sum(share * value for share, value in zip(shares, values, strict=True))

    bandwidth = rate([card.bandwidth for card in cards])
    compute = rate([card.compute for card in cards])
    return Gpu(
        vram=sum(card.count * card.vram for card in cards),
        bandwidth=bandwidth,
        link=rate([card.link for card in cards]),
        compute=compute,
        efficiency=rate([card.bandwidth * card.efficiency for card in cards]) / bandwidth,
        compute_efficiency=rate([c.compute * c.compute_efficiency for c in cards]) / compute,
        copy_latency=mean([card.copy_latency for card in cards]),
        launch=mean([card.launch for card in cards]),
        sync=mean([card.sync for card in cards]),
        reserved=sum(card.count * card.reserved for card in cards),
    )


@dataclass(frozen=True)
class Host:
    """The processor and its memory."""

    ram: int  # bytes
    bandwidth: float  # GB/s of reads, as reached by all cores together
    cores: int
    compute: float  # GFLOP/s of integer matrix products, as reached in prefill
    efficiency: float = 0.8  # of the bandwidth, reached by decode kernels
    attention_efficiency: float = 0.8  # ... by dense matrices
    head_efficiency: float = 0.8
    wake: float = 25.0  # µs to start the threads on a layer's experts
    resume: float = 0.0  # µs more than that for experts which had to be waited for
    overhead: float = 60.0  # µs of control for each layer
    lookup: float = 0.0  # µs until a layer's experts are found, if not all are in RAM for good
    copy: float = 10.0  # GB/s at which one thread copies memory

    @property
    def lockable(self) -> int:
        """Bytes that can be page-locked for copies to a GPU: what most systems allow."""
        return self.ram // 2


@dataclass(frozen=True)
class Disk:
    bandwidth: float  # GB/s of parallel direct reads
    latency: float = 100.0  # µs
    busy_efficiency: float = 1.0  # of the bandwidth, reached while all cores compute
    host_efficiency: float = 1.0  # of the speed of experts, reached while the disk is read


@dataclass(frozen=True)
class Hardware:
    """A machine. `gpu` is None for one that computes on its processor alone."""

    name: str
    label: str
    host: Host
    disk: Disk
    gpu: Gpu | None = None
    source: str = ""

    def with_sizes(self, ram: int | None = None, vram: int | None = None) -> Hardware:
        """The same machine with another amount of memory."""
        hardware = self
        if ram is not None:
            hardware = replace(hardware, host=replace(hardware.host, ram=ram))
        if vram is not None:
            if hardware.gpu is None:
                raise ValueError(f"{self.name} has no GPU, so it has no VRAM to change")
            hardware = replace(hardware, gpu=replace(hardware.gpu, vram=vram))
        return hardware

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def names() -> list[str]:
    return sorted(file.stem for file in Path(__file__).parent.glob("*.toml"))


def find(name: str) -> Hardware:
    """A description that ships with the package by name, or a file of the user's by path.

    Raises ValueError, with the key and the file, for what is missing, unknown or impossible.
    """
    path = Path(name)
    if path.suffix == ".toml":
        if not path.is_file():
            raise ValueError(f"{path}: no such hardware description")
    elif name in names():
        path = Path(__file__).parent / f"{name}.toml"
    else:
        raise ValueError(
            f"unknown hardware {name!r}; choose one of {', '.join(names())}, "
            "or give a .toml file of your own"
        )
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: no valid TOML: {error}") from error
    return from_dict(values, path)


def from_dict(values: dict[str, Any], path: Path) -> Hardware:
    """A description from the tables of a TOML file; `path` names it."""
    values = dict(values)
    tables = {"host": Host, "disk": Disk, "gpu": Gpu}
    parts = {
        name: _table(kind, values.pop(name), f"{path}: [{name}]")
        for name, kind in tables.items()
        if name in values
    }
    for name in ("host", "disk"):
        if name not in parts:
            raise ValueError(f"{path}: table [{name}] is missing")
    label, source = values.pop("label", path.stem), values.pop("source", "")
    if values:
        raise ValueError(
            f"{path}: unknown key {min(values)!r}; known: label, source, [host], [disk], [gpu]"
        )
    return Hardware(path.stem, str(label), source=str(source), **parts)


def _table(kind: type[Any], values: Any, where: str) -> Any:
    known = {field.name: field for field in fields(kind)}
    if not isinstance(values, dict):
        raise ValueError(f"{where} must be a table")
    for name in values:
        if name not in known:
            raise ValueError(f"{where} unknown key {name!r}; known: {', '.join(known)}")
    for name, field in known.items():
        if name not in values and field.default is MISSING:
            raise ValueError(f"{where} {name!r} is missing")
    return kind(**{name: _value(name, value, where) for name, value in values.items()})


def _value(name: str, value: Any, where: str) -> int | float:
    """A positive number; shares are at most 1, latencies may be 0."""
    if name in SIZES and isinstance(value, int | str) and not isinstance(value, bool):
        try:
            value = parse_bytes(value)
        except ValueError as error:
            raise ValueError(f"{where} {name!r}: {error}") from error
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{where} {name!r} is {value!r}, but must be a number")
    may_be_zero = name in (
        "copy_latency",
        "launch",
        "sync",
        "wake",
        "overhead",
        "lookup",
        "latency",
    )
    largest = 1.0 if name.endswith("efficiency") else 1e18
    if not value <= largest or value < 0 or (value == 0 and not may_be_zero):
        raise ValueError(
            f"{where} {name!r} is {value}, but must be {'0 or' if may_be_zero else 'above 0,'} "
            f"at most {largest:g}"
        )
    if name in ("cores", "count") and not isinstance(value, int):
        raise ValueError(f"{where} {name!r} is {value}, but must be a whole number")
    return value
