"""Memory sizes: how they are written, and how much this process may use.

A container's limit counts as much as the machine's memory: cgroup v1 and v2 are both read, and
the tightest of a process's own group and all groups above it decides.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import psutil

UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
UNLIMITED = 1 << 60  # version 1 writes "no limit" as a number just below 2^63
MARGIN = 512 << 20  # bytes left to others by default, or a tenth if that is more


def parse_bytes(text: int | str) -> int:
    """Bytes from "8G", "1.5 GiB", "3000M", "512MB" or a plain number. Units are powers of 1024."""
    if isinstance(text, int):
        number, unit = str(text), ""
    else:
        match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([KMGT]?)(i?B)?\s*", text, re.IGNORECASE)
        if match is None:
            raise ValueError(f"{text!r} is no size; write bytes, or a number with K, M, G or T: 8G")
        number, unit = match[1], match[2].upper()
    nbytes = int(float(number) * UNITS[unit]) if "." in number else int(number) * UNITS[unit]
    if nbytes < 0:
        raise ValueError(f"a size cannot be negative: {text!r}")
    return nbytes


def format_bytes(nbytes: float) -> str:
    """A size as people read it: "742 B", "3.2 MiB", "17.0 GiB"."""
    size, units = float(nbytes), ["B", "KiB", "MiB", "GiB", "TiB"]
    while abs(size) >= 1024 and len(units) > 1:
        size /= 1024
        units.pop(0)
    return f"{size:.0f} {units[0]}" if units[0] == "B" else f"{size:.1f} {units[0]}"


def available_bytes(proc: Path = Path("/proc")) -> int:
    """What can be taken without swapping or being killed: the machine's, or the container's."""
    return max(0, min([int(psutil.virtual_memory().available), *container_room(proc)]))


def default_limit(proc: Path = Path("/proc")) -> int:
    """What this process may hold in all if nobody says: what it has or is free, less a margin."""
    held, available = int(psutil.Process().memory_info().rss), available_bytes(proc)
    margin = max(available // 10, min(MARGIN, available // 4))
    return held + available - margin


def container_room(proc: Path = Path("/proc")) -> Iterator[int]:
    """For each memory limit above this process: limit minus use, where page cache is no use."""
    for group in _groups(proc):
        for folder in group.folders():
            limit = _number(folder / group.limit)
            if limit is not None and limit < UNLIMITED:
                cache = _reclaimable(folder / "memory.stat", group.cache)
                yield limit - (_number(folder / group.usage) or 0) + cache


class _Group(NamedTuple):
    """A process's group in one mounted hierarchy, and what its files are called there."""

    mount: Path
    path: str  # below the mount
    limit: str
    usage: str
    cache: str

    def folders(self) -> Iterator[Path]:
        """The group and all above it, as far as they can be seen from here."""
        folder = self.mount / self.path.strip("/")
        while not folder.is_dir() and folder != self.mount:  # a container sees its own part only
            folder = folder.parent
        yield folder
        while folder != self.mount:
            folder = folder.parent
            yield folder


def _groups(proc: Path) -> Iterator[_Group]:
    try:
        memberships = (proc / "self/cgroup").read_text().splitlines()
        mounts = (proc / "self/mountinfo").read_text().splitlines()
    except OSError:
        return  # not Linux, or /proc is hidden: no limits to be seen
    paths = {}  # by controller; version 2 has none
    for line in memberships:
        _, controllers, path = line.split(":", 2)
        paths.update(dict.fromkeys(controllers.split(","), path))
    for line in mounts:
        fields, _, rest = line.partition(" - ")
        kind, _, options = rest.split(" ", 2)
        root, mount = fields.split(" ")[3:5]
        if kind == "cgroup2" and "" in paths:
            names = "memory.max", "memory.current", "inactive_file"
            yield _Group(Path(_unescaped(mount)), _below(paths[""], root), *names)
        elif kind == "cgroup" and "memory" in options.split(",") and "memory" in paths:
            names = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
            yield _Group(Path(_unescaped(mount)), _below(paths["memory"], root), *names)


def _below(path: str, root: str) -> str:
    """`path` as seen through a mount that shows the hierarchy from `root` on."""
    root = _unescaped(root).rstrip("/")
    return path[len(root) :] if path == root or path.startswith(root + "/") else path


def _unescaped(path: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), path)


def _number(file: Path) -> int | None:
    """None: no such file, or "max"."""
    try:
        text = file.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def _reclaimable(stat: Path, name: str) -> int:
    try:
        lines = stat.read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.split()[:1] == [name]), 0)
