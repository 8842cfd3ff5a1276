"""Checkpoint formats: one file each, with `matches(path)` and `open_checkpoint(path, drafts)`."""

from __future__ import annotations

import os
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules

from tiered.checkpoints.checkpoint import Checkpoint, CheckpointError, Tensor

__all__ = ["Checkpoint", "CheckpointError", "Tensor", "names", "open_checkpoint"]


def names() -> list[str]:
    return [module.name for module in iter_modules(__path__)]


def open_checkpoint(path: Path | str, drafts: bool = False) -> Checkpoint:
    """Open a model; reads headers only, so that it takes no time whatever the model's size.

    With `drafts`, the layer that only drafts tokens is one more layer, if the model has one.

    Raises CheckpointError for a damaged or unsupported model and OSError for one that cannot be
    read at all.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder")
    if path.is_dir():
        os.listdir(path)  # a folder that cannot be read says so here; later it would look empty
    for name in names():
        module = import_module(f"{__name__}.{name}")
        if module.matches(path):
            checkpoint: Checkpoint = module.open_checkpoint(path, drafts)
            return checkpoint
    raise CheckpointError(
        f"{path} is no model: expected a GGUF file, a folder with config.json and *.safetensors, "
        "or a folder that `tiered convert` wrote"
    )
