"""The work folder: what a distillation has done so far, beside its destination, so that one that
was stopped goes on. It has no config.json and never opens as a model."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tiered.checkpoints.json_file import read_json
from tiered.quality.importance import Scores
from tiered.weights.resume import as_json, check_same, write_whole

SETTINGS = "settings.json"
SCORES = "scores.npz"


def work_path(destination: Path) -> Path:
    return destination.with_name(destination.name + ".distilling")


class WorkFolder:
    """Opens DESTINATION.distilling, or goes on with it.

    `settings` are all that the result depends on; ValueError if it was begun with others.
    """

    def __init__(self, destination: Path, settings: Mapping[str, Any]) -> None:
        self.path = work_path(destination)
        self.samples = self.path / "samples"
        self.layers = self.path / "layers"
        self.logits = self.path / "logits"
        plain, file = as_json(settings), self.path / SETTINGS
        if file.exists():
            check_same(self.path, read_json(file), plain)
        else:
            self.path.mkdir(parents=True, exist_ok=True)
            write_whole(file, json.dumps(plain, indent=2).encode())
        for folder in (self.samples, self.layers, self.logits):
            folder.mkdir(exist_ok=True)

    def layer_file(self, layer: int) -> Path:
        return self.layers / f"{layer:03}.safetensors"

    @property
    def scores(self) -> Mapping[str, Scores] | None:
        """By criterion; None until all samples are there."""
        file = self.path / SCORES
        if not file.exists():
            return None
        with np.load(file) as values:
            return dict(values)

    def keep_scores(self, scores: Mapping[str, Scores]) -> None:
        """The samples are complete."""
        partial = self.path / f"partial-{SCORES}"
        np.savez(partial, **dict(scores))  # type: ignore[arg-type]
        os.replace(partial, self.path / SCORES)

    def remove(self) -> None:
        shutil.rmtree(self.path)
