"""Opening an engine for a command, with a line that says so while it takes longer than a moment."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from tiered.commands.output import notes

if TYPE_CHECKING:
    from tiered.engine import Engine


def open_engine(model: Path, choices: dict[str, Any]) -> Engine:
    with notes.status(f"opening {model.name}"):
        from tiered.engine import Engine  # imports numba

        return Engine(model, **choices)
