"""Which servers of this user run on this machine: a small file for each."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

CLOCK_SECONDS = 5.0  # a process began "at another time" when the system's clock has been adjusted


def folder() -> Path:
    """Where the files are: of this user alone, and gone with the session where that can be."""
    base = os.environ.get("XDG_RUNTIME_DIR")
    if base and Path(base).is_dir():
        return Path(base) / "tiered"
    return Path(tempfile.gettempdir()) / f"tiered-{os.getuid()}"


@contextlib.contextmanager
def announced(**facts: Any) -> Iterator[None]:
    """Be listed by `running` until the block ends."""
    place = folder()
    place.mkdir(mode=0o700, parents=True, exist_ok=True)
    if place.stat().st_uid != os.getuid():
        raise PermissionError(f"{place} belongs to another user: remove it, or set XDG_RUNTIME_DIR")
    pid = os.getpid()
    file = place / f"{pid}.json"
    created = psutil.Process().create_time()
    unfinished = file.with_suffix(".tmp")  # `running` removes what it cannot read
    unfinished.write_text(json.dumps({"pid": pid, "created": created, **facts}), encoding="utf-8")
    unfinished.replace(file)
    try:
        yield
    finally:
        file.unlink(missing_ok=True)


def running() -> list[dict[str, Any]]:
    """What runs now, oldest first; files that a killed server left are removed."""
    found = []
    for file in folder().glob("*.json"):
        try:
            facts = json.loads(file.read_text(encoding="utf-8"))
            created = psutil.Process(facts["pid"]).create_time()
            alive = abs(created - facts["created"]) < CLOCK_SECONDS
        except (OSError, ValueError, KeyError, TypeError, psutil.Error):
            alive = False
        if alive:
            found.append(facts)
        else:
            file.unlink(missing_ok=True)
    return sorted(found, key=lambda facts: facts["created"])


def stop(facts: dict[str, Any]) -> None:
    """Ask a server to end what it has begun, and go."""
    os.kill(facts["pid"], signal.SIGTERM)
