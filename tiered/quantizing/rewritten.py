"""A checkpoint some of whose tensors are others, which lie in files of their own."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from tiered.checkpoints.checkpoint import Checkpoint, Tensor
from tiered.config import ModelConfig
from tiered.experts import ExpertLayout, expert_layout
from tiered.store import PROJECTIONS


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
    """The experts of one layer in the given formats: a file for all gates, one for all ups, one
    for all downs, which replace those of `checkpoint`. With `done`, they are there already."""

    def __init__(
        self, checkpoint: Rewritten, layer: int, formats: tuple[str, ...], done: bool = False
    ) -> None:
        config = checkpoint.config
        self.layout = layer_layout(config, formats)
        self.arrays = []  # uint8 [num_experts, nbytes]
        assert isinstance(checkpoint.tensors, dict)
        for projection, target in zip(PROJECTIONS, self.layout, strict=True):
            file = checkpoint.folder / f"layer-{layer}-{projection}"
            shape = config.num_experts, target.nbytes
            self.arrays.append(np.memmap(file, np.uint8, "r" if done else "w+", shape=shape))
            for expert in range(config.num_experts):
                name = f"layers.{layer}.experts.{expert}.{projection}"
                checkpoint.tensors[name] = Tensor(
                    name, target.format, checkpoint.original.tensors[name].shape, file,
                    expert * target.nbytes, target.nbytes,
                )  # fmt: skip

    @property
    def addresses(self) -> np.ndarray:
        """int64 [num_experts, 3]."""
        return np.stack(
            [
                array.ctypes.data + np.arange(len(array), dtype=np.int64) * array.shape[1]
                for array in self.arrays
            ],
            axis=1,
        )


def layer_layout(config: ModelConfig, formats: tuple[str, ...]) -> ExpertLayout:
    gate, up, down = formats
    return expert_layout(config.hidden_size, config.expert_size, gate, up, down)


def expert_bytes(config: ModelConfig, formats: tuple[str, ...]) -> int:
    """Bytes of the weights of one expert."""
    return sum(tensor.nbytes for tensor in layer_layout(config, formats))
