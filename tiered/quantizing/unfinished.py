"""What a quantization has done so far, on disk, so that one that was stopped goes on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from tiered.checkpoints.json_file import read_json
from tiered.quantizing.rewritten import Rewritten
from tiered.quantizing.walk import States
from tiered.weights.resume import as_json, check_same, write_whole

STATE = "state.json"


class Unfinished:
    """A hidden folder beside the destination, with the rounded experts and, in `state`, how far
    it is. `facts` say what is being made; ValueError if it was begun with others."""

    def __init__(self, destination: Path, facts: dict[str, Any]) -> None:
        facts = as_json(facts)
        self.folder = destination.absolute().parent / f".{destination.name}.quantizing"
        self.state: dict[str, Any] = {"facts": facts, "layers": 0, "few": 0, "rewritten": []}
        if (self.folder / STATE).exists():
            self.state = read_json(self.folder / STATE)
            check_same(self.folder, self.state["facts"], facts)
        self.folder.mkdir(parents=True, exist_ok=True)

    def save(self, **state: Any) -> None:
        self.state |= state
        write_whole(self.folder / STATE, json.dumps(self.state).encode())

    def save_layer(self, layers: int, few: int, states: States, checkpoint: Rewritten) -> None:
        """So many layers are done, and this is the text after them."""
        if states:
            np.save(self._states(layers), np.concatenate(states))
        self.save(layers=layers, few=few, rewritten=list(checkpoint.rewritten))
        self._states(layers - 1).unlink(missing_ok=True)

    def load_states(self, lengths: list[int]) -> States:
        """The text after the layers that are done; `lengths` are those of its windows."""
        whole = np.load(self._states(self.state["layers"]))
        parts = np.split(whole, np.cumsum(lengths)[:-1])
        return [np.ascontiguousarray(part) for part in parts]

    def load_rewritten(self, checkpoint: Rewritten) -> None:
        for name in self.state["rewritten"]:
            checkpoint.adopt(name)

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def _states(self, layers: int) -> Path:
        return self.folder / f"states-{layers}.npy"
