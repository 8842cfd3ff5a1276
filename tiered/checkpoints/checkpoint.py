"""An open checkpoint: the model's facts, and where each of its tensors lies on disk."""

from __future__ import annotations

import mmap
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tiered.checkpoints.checksums import Progress, first_damaged, of_hub_cache
from tiered.config import ModelConfig


class CheckpointError(ValueError):
    """The files of a model are damaged, incomplete or of a kind that is not supported."""


class Tensor(NamedTuple):
    """Where a tensor lies: `nbytes` at `offset` of `file`, rows of `format` blocks.

    `shape` is [out_features, in_features] or [size]; `format` is a name of cpu_kernels.formats.
    Where the file has the values in another order or in several pieces, `packed` makes such rows
    of them; `file` and `offset` then only say where they begin.
    """

    name: str
    format: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    nbytes: int
    packed: Packed | None = None


class Packed(NamedTuple):
    """The pieces of a tensor as the file has them, and what turns them into its rows."""

    parts: tuple[Tensor, ...]
    unpack: Callable[..., np.ndarray]  # uint8 of each part -> uint8 [nbytes], contiguous


NO_PIECES = Packed((), np.asarray)


class Checkpoint:
    """A model on disk. Opening reads headers only; files are memory-mapped when first used.

    Tensors have the canonical names of tensor_names.py. `metadata` is what the file itself
    says (config.json or GGUF keys). `tokenizer_source` is a folder with tokenizer.json, or a
    mapping with GGUF's `tokenizer.*` keys whose long arrays are read when asked for.
    """

    def __init__(
        self,
        path: Path,
        config: ModelConfig,
        tensors: Mapping[str, Tensor],
        metadata: Mapping[str, Any],
        tokenizer_source: Path | Mapping[str, Any],
    ) -> None:
        self.path = path
        self.config = config
        self.tensors = tensors
        self.metadata = metadata
        self.tokenizer_source = tokenizer_source
        self._lock = threading.Lock()
        self._maps: dict[Path, mmap.mmap] = {}
        self._closed = False

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Checkpoint {self.path}: {self.config.model_type}, {len(self.tensors)} tensors>"

    def data(self, name: str) -> np.ndarray:
        """The tensor's bytes, uint8 [nbytes]: a view of the memory map, nothing is read yet."""
        return self.view(self.tensors[name])

    def view(self, tensor: Tensor) -> np.ndarray:
        if tensor.packed is not None:
            return tensor.packed.unpack(*map(self.view, tensor.packed.parts))
        data = np.frombuffer(self._map(tensor.file), np.uint8)
        if tensor.offset + tensor.nbytes > len(data):
            raise OSError(f"{tensor.file}: the file became shorter while it was open")
        return data[tensor.offset : tensor.offset + tensor.nbytes]

    def float32(self, name: str) -> np.ndarray:
        """A copy of the tensor as float32, whatever its format: for norms, biases and routers."""
        from tiered.weights.dequantize import dequantize

        tensor = self.tensors[name]
        return dequantize(self.data(name), tensor.format, tensor.shape)

    def advise(self, tensor: Tensor) -> None:
        """Ask the system to read the tensor ahead, where it can be asked."""
        if hasattr(mmap, "MADV_WILLNEED"):
            start = tensor.offset // mmap.PAGESIZE * mmap.PAGESIZE
            size = tensor.offset + tensor.nbytes - start
            self._map(tensor.file).madvise(mmap.MADV_WILLNEED, start, size)

    def checksums(self) -> dict[Path, str]:
        """The sha256 of the files for which one was recorded, by those who wrote or downloaded
        them."""
        tensors = self.tensors.values()
        pieces = (part for each in tensors for part in (each.packed or NO_PIECES).parts)
        return of_hub_cache(sorted({each.file for each in (*tensors, *pieces)}))

    def verify(self, progress: Progress = lambda done, total: None) -> int:
        """Read the files that have a recorded checksum, and compare: returns how many they are.
        CheckpointError names the first that differs."""
        checksums = self.checksums()
        damaged = first_damaged(checksums, progress)
        if damaged is not None:
            raise CheckpointError(
                f"{damaged} is damaged: its checksum differs from the recorded one; get it anew"
            )
        return len(checksums)

    def close(self) -> None:
        """Give the memory maps up; each goes when the last array that views it does."""
        with self._lock:
            self._closed = True
            self._maps.clear()

    def _map(self, file: Path) -> mmap.mmap:
        with self._lock:
            if self._closed:
                raise ValueError(f"{self.path} is closed")
            if file not in self._maps:
                with file.open("rb") as opened:
                    mapped = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
                _prefer_huge_pages(mapped)
                self._maps[file] = mapped
            return self._maps[file]


def _prefer_huge_pages(mapped: mmap.mmap) -> None:
    """Where the file system can, what is read from now on is cached and mapped 2 MiB at a time:
    fewer faults, and weights that are read through fewer page table entries."""
    advice = getattr(mmap, "MADV_HUGEPAGE", None)
    if advice is not None:
        with suppress(OSError):  # a kernel without them: small pages will do
            mapped.madvise(advice)
