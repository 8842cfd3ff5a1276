"""Calibration: a text passes through a model, and a tap hears what its experts say of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from tiered.commands import options as opt
from tiered.commands.output import notes, steps_progress

if TYPE_CHECKING:
    from tiered.quality.layer_tap import LayerTap

Tap = TypeVar("Tap", bound="LayerTap")

max_tokens_option = opt.option(
    "--max-tokens", type=click.IntRange(2), default=8192, help="Of the text."
)


def hear_text(
    model: Path,
    make_tap: Callable[[Any], Tap],
    text: Path,
    max_tokens: int,
    choices: dict[str, Any],
) -> Tap:
    """The tap that `make_tap` makes of a backend, after it heard the text."""
    if choices["device"] != "cpu":
        raise click.UsageError("a calibration text is read on the CPU: leave --device out")
    with notes.status(f"opening {model.name}"):
        from tiered.backend import open_backend
        from tiered.config import EngineConfig
        from tiered.engine import Engine
        from tiered.quality.layer_tap import read
        from tiered.quality.text import text_tokens

        backend = open_backend(EngineConfig(**choices))
        try:
            tap = make_tap(backend)
            engine = Engine(model, backend=tap, **choices)
        except BaseException:
            backend.close()
            raise
    with engine, steps_progress() as bar:
        ids = text_tokens(engine.tokenizer, text, max_tokens)
        task = bar.add_task("windows", total=None)
        read(engine, ids, lambda done, total: bar.update(task, completed=done, total=total))
    return tap
