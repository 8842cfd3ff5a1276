"""A JSON object in a file that is not trusted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tiered.checkpoints.checkpoint import CheckpointError


def read_json(file: Path) -> dict[str, Any]:
    """The object in `file`, which must exist."""
    if not file.is_file():
        raise CheckpointError(f"{file} is missing")
    return parse_json(file.read_bytes(), file)


def parse_json(text: bytes, file: Path) -> dict[str, Any]:
    """The object that `text`, a part of `file`, spells."""
    try:
        value = json.loads(text.decode(), object_pairs_hook=_without_twins)
    except RecursionError:
        raise CheckpointError(f"{file}: damaged JSON: nested too deeply") from None
    except ValueError as error:
        raise CheckpointError(f"{file}: damaged JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{file}: expected a JSON object, not a {type(value).__name__}")
    return value


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError("a key is there twice")
    return values
