"""A checkpoint some of whose tensors are others, which lie in files of their own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

import numpy as np

from tiered.checkpoints.checkpoint import Checkpoint, Tensor
from tiered.config import ModelConfig
from tiered.experts import LayerLayouts, expert_layout
from tiered.store import PROJECTIONS

Formats = tuple[str, str, str]  # of an expert's gate, up and down


class Rewritten(Checkpoint):
    """`original`, until something else is written over it, into files in `folder`."""

    def __init__(self, original: Checkpoint, folder: Path) -> None:
        super().__init__(
            original.path,
            original.config,
            dict(original.tensors),
            original.metadata,
            original.tokenizer_source,
        )
        self.original = original
        self.folder = folder
        self.rewritten: dict[str, Tensor] = {}  # but for experts

    def __enter__(self) -> Rewritten:
        return self

    def rewrite(self, name: str, values: np.ndarray) -> None:
        """A small tensor becomes float32 `values`."""
        (self.folder / name).write_bytes(np.ascontiguousarray(values, np.float32).tobytes())
        self.adopt(name)

    def adopt(self, name: str) -> None:
        """The file in the folder has what was written over the tensor."""
        shape = self.original.tensors[name].shape
        file, nbytes = self.folder / name, 4 * math.prod(shape)
        assert isinstance(self.tensors, dict)
        self.rewritten[name] = Tensor(name, "f32", shape, file, 0, nbytes)
        self.tensors[name] = self.rewritten[name]


class ExpertFiles:
    """The experts of one layer in the given formats, each one's: a file for all gates, one for all
    ups, one for all downs, which replace those of `checkpoint`. With `done`, they are there
    already."""

    def __init__(
        self, checkpoint: Rewritten, layer: int, formats: Sequence[Formats], done: bool = False
    ) -> None:
        config = checkpoint.config
        self.layouts = layer_layouts(config, formats)
        self.matrices: list[list[np.ndarray]] = []  # of gates, ups, downs: uint8 [nbytes] of each
        assert isinstance(checkpoint.tensors, dict)
        for part, projection in enumerate(PROJECTIONS):
            file = checkpoint.folder / f"layer-{layer}-{projection}"
            targets = [self.layouts.layout(n)[part] for n in range(config.num_experts)]
            ends = list(accumulate(target.nbytes for target in targets))
            whole = np.memmap(file, np.uint8, "r" if done else "w+", shape=(ends[-1],))
            self.matrices.append(np.split(whole, ends[:-1]))
            for expert, (target, end) in enumerate(zip(targets, ends, strict=True)):
                name = f"layers.{layer}.experts.{expert}.{projection}"
                checkpoint.tensors[name] = Tensor(
                    name, target.format, checkpoint.original.tensors[name].shape, file,
                    end - target.nbytes, target.nbytes,
                )  # fmt: skip

    def write(self, expert: int, matrices: Sequence[np.ndarray]) -> None:
        """Fill in the bytes of an expert's gate, up and down."""
        for of_part, data in zip(self.matrices, matrices, strict=True):
            of_part[expert][:] = data.reshape(-1)

    @property
    def addresses(self) -> np.ndarray:
        """int64 [num_experts, 3]."""
        rows = [[each.ctypes.data for each in of_part] for of_part in self.matrices]
        return np.array(rows, np.int64).T.copy()


def layer_layouts(config: ModelConfig, formats: Sequence[Formats]) -> LayerLayouts:
    """Of the experts of a layer, from the formats of each."""
    sizes = config.hidden_size, config.expert_size
    return LayerLayouts.of([expert_layout(*sizes, *each) for each in formats])


def expert_bytes(config: ModelConfig, formats: Formats) -> int:
    """Bytes of the weights of one expert."""
    layout = expert_layout(config.hidden_size, config.expert_size, *formats)
    return sum(tensor.nbytes for tensor in layout)
