"""The store: every expert of a model on disk, the bottom of the hierarchy."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cache, partial
from pathlib import Path
from time import perf_counter

import numpy as np

from cpu_kernels.formats import FORMATS
from tiered.checkpoints.checkpoint import Checkpoint, CheckpointError, Tensor
from tiered.config import EXPERT_FORMATS, check_quantization
from tiered.experts import (
    ExpertKey,
    ExpertLayout,
    LayerLayouts,
    TensorLayout,
    aligned,
    expert_layout,
)
from tiered.policies import Space
from tiered.reader import BLOCK, FileReader
from tiered.weights.dense import is_usable
from tiered.weights.quantize import quantize_rows

PROJECTIONS = "gate", "up", "down"
PIECE = 4 << 20  # bytes of a large expert that one thread reads at a time

Task = Callable[[], None]


class ExpertStore:
    """Reads experts of a checkpoint, as blobs, quantizing float ones on the way if asked.

    `quantize` is one of config.QUANTIZATIONS. `readers` threads share the pieces
    of one large expert; `read_into` itself may be called from any number of threads.
    """

    def __init__(
        self, checkpoint: Checkpoint, quantize: str = "int4", readers: int = 4, direct: bool = True
    ) -> None:
        check_quantization(quantize)
        self.checkpoint = checkpoint
        self.quantize = quantize
        self.bytes_read = 0
        self.seconds = 0.0  # that reading took, all threads together
        self._layouts = {
            layer: self._layer_layouts(layer) for layer in checkpoint.config.sparse_layers
        }
        self.mappable = all(self._is_mappable(layer) for layer in self._layouts)
        self._direct = direct
        self._files: dict[Path, FileReader] = {}
        self._lock = threading.Lock()
        self._readers = ThreadPoolExecutor(readers, "tiered-reader") if readers > 1 else None
        self._tables: dict[int, np.ndarray] = {}

    def __enter__(self) -> ExpertStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def layouts(self, layer: int) -> LayerLayouts:
        """Where gate, up and down lie in the blobs of this layer's experts."""
        return self._layouts[layer]

    def layout(self, layer: int) -> ExpertLayout:
        """The same, of a layer whose experts are all alike. ValueError if they are not."""
        layouts = self._layouts[layer]
        if layouts.is_mix:
            raise ValueError(
                f"{self.checkpoint.path}: experts of layer {layer} differ in their number formats"
            )
        return layouts.distinct[0]

    @property
    def is_mix(self) -> bool:
        """Whether the experts of some layer differ in their number formats."""
        return any(layouts.is_mix for layouts in self._layouts.values())

    @property
    def blob_bytes(self) -> list[int]:
        """Bytes of an expert's blob, by layer, of the largest where they differ; 0 for a layer
        without experts."""
        return self._by_layer(max)

    @property
    def layer_bytes(self) -> list[int]:
        """Bytes of all experts, by layer."""
        return self._by_layer(sum)

    def _by_layer(self, of: Callable[[Iterable[int]], int]) -> list[int]:
        layers = range(self.checkpoint.config.num_layers)
        return [
            of(self._layouts[layer].blob_bytes) if layer in self._layouts else 0 for layer in layers
        ]

    def space(self, capacity: int) -> Space:
        """What a tier with so many bytes for these experts manages."""
        mixes = {n: each.blob_bytes for n, each in self._layouts.items() if each.is_mix}
        return Space(capacity, tuple(self.blob_bytes), mixes)

    @property
    def offsets(self) -> dict[int, np.ndarray]:
        """Where gate, up and down lie in each expert's blob, by layer: int64 [num_experts, 3]."""
        return {layer: layouts.offsets for layer, layouts in self._layouts.items()}

    def addresses(self, key: ExpertKey) -> np.ndarray:
        """int64 [3]: where gate, up and down lie in the memory map. For a `mappable` store."""
        address: np.ndarray = self.address_table(key.layer)[key.expert]
        return address

    def address_table(self, layer: int) -> np.ndarray:
        """int64 [num_experts, 3] of addresses. They are valid until the checkpoint is closed."""
        if not self.mappable:
            raise ValueError(f"{self.checkpoint.path}: experts must be read, not mapped")
        table = self._tables.get(layer)
        if table is None:
            bases: dict[Path, int] = {}
            rows = []
            for expert in range(self.checkpoint.config.num_experts):
                for tensor in self.tensors(ExpertKey(layer, expert)):
                    if tensor.file not in bases:
                        start = self.checkpoint.view(tensor).__array_interface__["data"][0]
                        bases[tensor.file] = start - tensor.offset
                    rows.append(bases[tensor.file] + tensor.offset)
            table = self._tables[layer] = np.array(rows, np.int64).reshape(-1, 3)
        return table

    def read_into(self, key: ExpertKey, slot: np.ndarray) -> None:
        """Fill `slot` (uint8, at least the layout's `nbytes`) with the expert's blob.

        Slots at multiples of 4096, with room for whole blocks of 4096, are filled without a copy
        where the file allows it. Raises OSError naming the file; the slot is undefined then.
        """
        self.run(list(self._tasks(key, slot)), sum(tensor.nbytes for tensor in self.tensors(key)))

    def run(self, tasks: list[Task], nbytes: int) -> None:
        """Do what fills a slot, the reader threads helping; returns when no task runs any more.

        `nbytes` of an expert are counted as read. Raises OSError naming the file."""
        start = perf_counter()
        # For less, waking the threads costs what they gain.
        pool = self._readers if nbytes > PIECE else None
        shared = [] if pool is None else [pool.submit(task) for task in tasks[1:]]
        try:
            for task in tasks[: len(tasks) - len(shared)]:
                task()
        finally:
            wait(shared)  # whatever happens, nobody writes to the slot afterwards
        for future in shared:
            future.result()
        with self._lock:
            self.bytes_read += nbytes
            self.seconds += perf_counter() - start

    def advise(self, keys: Iterable[ExpertKey]) -> None:
        """Ask the system to bring these experts into the page cache: for mapped use."""
        for key in keys:
            for tensor in self.tensors(key):
                self.checkpoint.advise(tensor)

    def close(self) -> None:
        """End the threads and close the files."""
        if self._readers is not None:
            self._readers.shutdown()
        with self._lock:
            for reader in self._files.values():
                reader.close()
            self._files.clear()

    def tensors(self, key: ExpertKey) -> list[Tensor]:
        """An expert's gate, up and down in the checkpoint."""
        prefix = f"layers.{key.layer}.experts.{key.expert}."
        return [self.checkpoint.tensors[prefix + name] for name in PROJECTIONS]

    def _layer_layouts(self, layer: int) -> LayerLayouts:
        config = self.checkpoint.config
        sizes = config.hidden_size, config.hidden_size, config.expert_size  # in_features

        @cache
        def layout(*stored: str) -> ExpertLayout:
            formats = [self._format(*pair) for pair in zip(stored, sizes, strict=True)]
            return expert_layout(config.hidden_size, config.expert_size, *formats)

        keys = (ExpertKey(layer, expert) for expert in range(config.num_experts))
        return LayerLayouts.of([layout(*(t.format for t in self.tensors(key))) for key in keys])

    def _format(self, stored: str, in_features: int) -> str:
        """The number format that a stored expert matrix is computed in."""
        if self.quantize == "none" or not FORMATS[stored].is_float:
            return stored
        format = EXPERT_FORMATS[self.quantize]
        if in_features % FORMATS[format].block_size:
            raise CheckpointError(
                f"{self.checkpoint.path}: rows of {in_features} values cannot be quantized in "
                f"groups of {FORMATS[format].block_size}; use --quantize none"
            )
        return format

    def _is_mappable(self, layer: int) -> bool:
        """Whether the file's own bytes can be computed with."""
        layouts = self._layouts[layer]
        return all(
            tensor.format == target.format and is_usable(tensor)
            for expert in range(self.checkpoint.config.num_experts)
            for tensor, target in zip(
                self.tensors(ExpertKey(layer, expert)), layouts.layout(expert), strict=True
            )
        )

    def _tasks(self, key: ExpertKey, slot: np.ndarray) -> Iterator[Task]:
        """What fills the slot; each task writes to a part of its own."""
        layout, tensors = self._layouts[key.layer].layout(key.expert), self.tensors(key)
        if len(slot) < layout.nbytes:
            raise ValueError(f"{key} takes {layout.nbytes} bytes, but the slot has {len(slot)}")
        if self.is_blob(key):  # as in our own stores: the blob in one run
            start, nbytes = tensors[0].offset, layout.nbytes
            if start % BLOCK == 0:  # rows are padded there, so that whole blocks can be read
                room = min(len(slot), self.file_bytes(tensors[0].file) - start)
                nbytes = min(aligned(nbytes, BLOCK), room)
            yield from self.reads(tensors[0].file, start, slot[:nbytes])
            return
        for tensor, target in zip(tensors, layout, strict=True):
            out = slot[target.offset : target.offset + target.nbytes]
            if tensor.packed is not None:
                yield partial(self._unpack, tensor, target, out)
            elif tensor.format == target.format:
                yield from self.reads(tensor.file, tensor.offset, out)
            else:
                yield from self._quantizations(tensor, target, out)

    def is_blob(self, key: ExpertKey) -> bool:
        """Whether the file has this expert as a blob: in its layout, in one run."""
        layout, tensors = self._layouts[key.layer].layout(key.expert), self.tensors(key)
        first = tensors[0]
        return all(
            tensor.packed is None
            and tensor.format == target.format
            and tensor.file == first.file
            and tensor.offset - first.offset == target.offset
            for tensor, target in zip(tensors, layout, strict=True)
        )

    def file_bytes(self, file: Path) -> int:
        return self._reader(file).size

    def reads(self, file: Path, offset: int, out: np.ndarray) -> Iterator[Task]:
        """Tasks that fill `out` from `offset` of a file, in pieces that threads can share."""
        reader = self._reader(file)
        for start in range(0, len(out), PIECE):
            yield partial(reader.read_into, offset + start, out[start : start + PIECE])

    def _quantizations(
        self, tensor: Tensor, target: TensorLayout, out: np.ndarray
    ) -> Iterator[Task]:
        """Read a few rows of floats, quantize them into `out`."""
        reader = self._reader(tensor.file)
        num_rows, row_bytes = tensor.shape[0], tensor.nbytes // tensor.shape[0]
        rows = out.reshape(num_rows, -1)
        step = max(1, PIECE // row_bytes)

        def task(first: int) -> None:
            part = rows[first : first + step]
            data = np.empty(len(part) * row_bytes, np.uint8)
            reader.read_into(tensor.offset + first * row_bytes, data)
            part[:] = quantize_rows(data, tensor, target.format)

        for first in range(0, num_rows, step):
            yield partial(task, first)

    def _unpack(self, tensor: Tensor, target: TensorLayout, out: np.ndarray) -> None:
        """Read the pieces of a matrix, make rows of them, quantize these if asked."""
        assert tensor.packed is not None
        pieces = [np.empty(part.nbytes, np.uint8) for part in tensor.packed.parts]
        for part, piece in zip(tensor.packed.parts, pieces, strict=True):
            self._reader(part.file).read_into(part.offset, piece)
        data = tensor.packed.unpack(*pieces)
        if tensor.format != target.format:
            data = quantize_rows(data, tensor, target.format).reshape(-1)
        out[:] = data

    def _reader(self, file: Path) -> FileReader:
        with self._lock:
            if file not in self._files:
                self._files[file] = FileReader(file, self._direct)
            return self._files[file]
