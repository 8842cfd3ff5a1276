"""Write a checkpoint as a store, once, so that nothing is quantized or gathered when it runs."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tiered.checkpoints.checkpoint import Checkpoint
from tiered.checkpoints.config_json import config_to_json
from tiered.experts import ExpertKey, ExpertLayout, aligned
from tiered.formats import open_checkpoint
from tiered.formats.store import (
    DENSE,
    GGUF_TOKENIZER,
    MANIFEST,
    STRIDE_ALIGNMENT,
    TOKENIZER,
    VERSION,
    Run,
    array_file,
    manifest_bytes,
)
from tiered.store import ExpertStore
from tiered.weights.dense import dense_format, dense_matrix, dense_tensors, matrix_bytes

BATCH = 64 << 20  # bytes of blobs that are gathered before they are written
MARGIN = 64 << 20  # bytes of disk to leave free
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "config.json",
)

Progress = Callable[[int, int], None]  # bytes written so far, bytes in all


def convert(
    source: Path | str,
    destination: Path | str,
    quantize: str = "int4",
    progress: Progress | None = None,
) -> Path:
    """Write the model at `source` as a store into the new folder `destination`.

    Computing with the store gives bit for bit what computing with the source and the same
    `quantize` gives. Raises FileExistsError if there is something at `destination`, and OSError
    if the disk is too small. What is interrupted is removed; should even that fail, it does not
    open.
    """
    destination = Path(destination)
    check_free(destination)
    with open_checkpoint(source, drafts=True) as checkpoint:
        write_store(checkpoint, destination, quantize, progress)
    return destination


def check_free(destination: Path) -> None:
    """FileExistsError if something has this name already."""
    if destination.exists():
        raise FileExistsError(f"{destination} exists already; delete it or choose another name")


def write_store(
    checkpoint: Checkpoint, destination: Path, quantize: str, progress: Progress | None = None
) -> None:
    """The same for an open checkpoint."""
    with ExpertStore(checkpoint, quantize) as store:
        writer = _Writer(checkpoint, store, destination, progress or (lambda done, total: None))
        check_space(destination, writer.total)
        destination.mkdir(parents=True)
        try:
            writer.write()
        except BaseException:
            shutil.rmtree(destination, ignore_errors=True)
            raise


def check_space(destination: Path, nbytes: int) -> None:
    """OSError if the disk has no room for so many bytes, and some more."""
    parent = next(p for p in destination.absolute().parents if p.exists())
    free = shutil.disk_usage(parent).free
    if free < nbytes + MARGIN:
        reason = f"{nbytes + MARGIN} bytes are needed, but only {free} are free"
        raise OSError(errno.ENOSPC, reason, str(parent))


class _Alike(NamedTuple):
    """Experts of a layer that have one layout: all of them, but for a mix."""

    layer: int
    layout: ExpertLayout
    experts: list[int]


class _Writer:
    def __init__(
        self, checkpoint: Checkpoint, store: ExpertStore, folder: Path, progress: Progress
    ) -> None:
        self.checkpoint = checkpoint
        self.store = store
        self.folder = folder
        self.progress = progress
        self.dense = dense_tensors(checkpoint)
        self.arrays: dict[int, list[_Alike]] = defaultdict(list)  # by stride
        for layer in checkpoint.config.sparse_layers:
            layouts = store.layouts(layer)
            for kind, layout in enumerate(layouts.distinct):
                experts = np.flatnonzero(layouts.kinds == kind).tolist()
                stride = aligned(layout.nbytes, STRIDE_ALIGNMENT)
                self.arrays[stride].append(_Alike(layer, layout, experts))
        self.total = self._total_bytes()
        self.done = 0
        self.files: dict[str, dict[str, Any]] = {}

    def _total_bytes(self) -> int:
        experts = sum(
            stride * len(alike.experts) for stride, rows in self.arrays.items() for alike in rows
        )
        dense = sum(
            aligned(matrix_bytes(dense_format(tensor, self.store.quantize), tensor.shape))
            for tensor in self.dense
        )
        return experts + dense

    def write(self) -> None:
        runs: dict[int, list[Run]] = {n: [] for n in self.checkpoint.config.sparse_layers}
        for number, (stride, rows) in enumerate(self.arrays.items()):
            self._write_array(number, stride, rows)
            first_row = 0
            for alike in rows:
                formats = [tensor.format for tensor in alike.layout]
                runs[alike.layer].append(Run(number, first_row, stride, formats, alike.experts))
                first_row += len(alike.experts)
        experts = {n: of_layer if len(of_layer) > 1 else of_layer[0][:-1]
                   for n, of_layer in runs.items()}  # fmt: skip
        dense = self._write_dense()
        self._write_tokenizer()
        self._commit(
            {
                "format": "tiered-store",
                "version": VERSION,
                "quantize": self.store.quantize,
                "source": self.checkpoint.path.name,
                "config": config_to_json(self.checkpoint.config),
                "experts": experts,
                "dense": dense,
                "files": self.files,
            }
        )

    def _write_array(self, number: int, stride: int, rows: list[_Alike]) -> None:
        from mmap_ninja import numpy as mmap_ninja_numpy

        name, digest = array_file(number), hashlib.sha256()

        def blobs() -> Iterator[np.ndarray]:
            for layer, layout, experts in rows:
                for expert in experts:
                    blob = np.zeros(stride, np.uint8)
                    self.store.read_into(ExpertKey(layer, expert), blob[: layout.nbytes])
                    digest.update(blob.data)
                    self._advance(stride)
                    yield blob

        out = (self.folder / name).parent
        mmap_ninja_numpy.from_generator(out, blobs(), batch_size=max(1, BATCH // stride))
        self._record(name, digest.hexdigest())

    def _write_dense(self) -> dict[str, Any]:
        """The other tensors one after the other, each on a cache line."""
        entries: dict[str, Any] = {}
        digest = hashlib.sha256()
        with (self.folder / DENSE).open("xb") as file:
            for tensor in self.dense:
                if len(tensor.shape) == 2:
                    data, format, _ = dense_matrix(
                        self.checkpoint, tensor.name, self.store.quantize
                    )
                else:
                    data, format = self.checkpoint.data(tensor.name), tensor.format
                entries[tensor.name] = [format, list(tensor.shape), file.tell()]
                for part in (data.data, bytes(aligned(len(data)) - len(data))):
                    file.write(part)
                    digest.update(part)
                self._advance(aligned(len(data)))
        self._record(DENSE, digest.hexdigest())
        return entries

    def _write_tokenizer(self) -> None:
        folder, source = self.folder / TOKENIZER, self.checkpoint.tokenizer_source
        folder.mkdir()
        if isinstance(source, Mapping):
            (folder / GGUF_TOKENIZER).write_text(json.dumps(dict(source)), encoding="utf-8")
        else:
            for name in TOKENIZER_FILES:
                if (source / name).is_file():
                    shutil.copyfile(source / name, folder / name)
        for file in sorted(folder.iterdir()):
            digest = hashlib.sha256(file.read_bytes()).hexdigest()
            self._record(f"{TOKENIZER}/{file.name}", digest)

    def _record(self, name: str, digest: str) -> None:
        """The file is complete: make it last, and remember its checksum."""
        _sync(self.folder / name)
        self.files[name] = {"nbytes": (self.folder / name).stat().st_size, "sha256": digest}

    def _commit(self, manifest: dict[str, Any]) -> None:
        """Only now does the folder become a store."""
        partial = self.folder / (MANIFEST + ".partial")
        partial.write_bytes(manifest_bytes(manifest))
        _sync(partial)
        os.replace(partial, self.folder / MANIFEST)

    def _advance(self, nbytes: int) -> None:
        self.done += nbytes
        self.progress(self.done, self.total)


def _sync(file: Path) -> None:
    with file.open("rb+") as opened:
        os.fsync(opened.fileno())
