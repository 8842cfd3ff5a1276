"""What long jobs need to go on where they were stopped: whether what they find is their own, and
files that are there only when they are complete."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np


def as_json(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as they are read back from a file: in JSON's types."""
    plain: dict[str, Any] = json.loads(json.dumps(settings))
    return plain


def check_same(folder: Path, begun: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """ValueError names the settings that a job in `folder` was begun with otherwise."""
    others = [name for name, value in settings.items() if begun.get(name) != value]
    if others:
        raise ValueError(
            f"{folder} was begun with another {' and '.join(others)}: give the same command, or "
            "delete it"
        )


def stamps(files: Iterable[Path]) -> list[list[Any]]:
    """What tells whether files are still the same: paths, sizes and times."""
    stats = [(file.resolve(), file.stat()) for file in files]
    return [[str(path), stat.st_size, stat.st_mtime_ns] for path, stat in stats]


def token_digest(ids: Sequence[int]) -> str:
    return hashlib.sha256(np.asarray(ids, np.int64).tobytes()).hexdigest()


def write_whole(file: Path, data: bytes) -> None:
    """Write a file that has its name only when it is complete."""
    partial = file.with_name(file.name + ".partial")
    try:
        partial.write_bytes(data)
        os.replace(partial, file)
    finally:
        partial.unlink(missing_ok=True)
