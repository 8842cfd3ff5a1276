"""tiered's own store: experts side by side, as `tiered convert` (tiered.weights.convert) writes it.

A folder with `manifest.json`, one `experts-<n>` array per blob size (uint8 [num_experts, stride],
readable with mmap_ninja.numpy), `dense.bin` and `tokenizer/`. The manifest is written last: a
folder without it was never finished and is not opened.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from tiered.checkpoints.checkpoint import Checkpoint, CheckpointError, Tensor
from tiered.checkpoints.config_json import config_from_json
from tiered.checkpoints.expected_tensors import check_tensors
from tiered.checkpoints.facts import Facts
from tiered.checkpoints.json_file import read_json
from tiered.config import ModelConfig
from tiered.experts import ExpertLayout, expert_layout
from tiered.models import read_config
from tiered.weights.dense import matrix_bytes

MANIFEST = "manifest.json"
DENSE = "dense.bin"
TOKENIZER = "tokenizer"
GGUF_TOKENIZER = "gguf.json"  # in the tokenizer's folder, where the source was a GGUF file
VERSION = 1
STRIDE_ALIGNMENT = 4096  # bytes; blobs start on pages, so that they can be read directly


def array_file(number: int) -> str:
    """Where the blobs of one size lie, relative to the store: mmap_ninja's name."""
    return f"experts-{number}/data.ninja"


def matches(path: Path) -> bool:
    return path.is_dir() and any((path / name).exists() for name in (MANIFEST, DENSE, "experts-0"))


def open_checkpoint(path: Path, drafts: bool = False) -> Checkpoint:
    file = path / MANIFEST
    if not file.exists():
        raise CheckpointError(
            f"{path} is half-written: {MANIFEST} is missing; delete the folder and convert again"
        )
    manifest = read_json(file)
    facts = Facts(manifest, file)
    if facts.text("format") != "tiered-store" or facts.integer("version") != VERSION:
        raise CheckpointError(f"{file}: not a store of version {VERSION}; convert the model again")
    config = read_config(config_from_json, Facts(facts.mapping("config"), file))
    sizes = _check_files(path, facts)
    tensors = {tensor.name: tensor for tensor in _dense(path, facts, sizes)}
    tensors |= {tensor.name: tensor for tensor in _experts(path, facts, config, sizes)}
    if not drafts:
        drafting = range(config.num_layers - config.num_draft_layers, config.num_layers)
        extra = tuple(f"layers.{layer}." for layer in drafting)
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(extra)}
        config = config.without_drafts()
    check_tensors(path, config, tensors)
    tokenizer = path / TOKENIZER / GGUF_TOKENIZER
    source = _LazyJson(tokenizer) if tokenizer.exists() else path / TOKENIZER
    return StoreCheckpoint(path, config, tensors, manifest, source)


class StoreCheckpoint(Checkpoint):
    """A store knows the checksums of its files."""

    def checksums(self) -> dict[Path, str]:
        return {self.path / name: entry["sha256"] for name, entry in self.metadata["files"].items()}


class _LazyJson(Mapping[str, Any]):
    """An object in a file that is read when the first value is asked for."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._values: dict[str, Any] | None = None

    def _read(self) -> dict[str, Any]:
        if self._values is None:
            self._values = read_json(self._file)
        return self._values

    def __getitem__(self, key: str) -> Any:
        return self._read()[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._read())

    def __len__(self) -> int:
        return len(self._read())


def _check_files(path: Path, facts: Facts) -> dict[str, int]:
    """Bytes of each file, which are those that the manifest says."""
    sizes: dict[str, int] = {}
    for name, entry in facts.mapping("files").items():
        known = Facts(entry if isinstance(entry, dict) else {}, facts.source)
        sizes[name] = known.integer("nbytes", maximum=2**63)
        known.text("sha256")
        if ".." in Path(name).parts or Path(name).is_absolute() or not (path / name).is_file():
            raise CheckpointError(f"{path / name} is missing; convert the model again")
        size = (path / name).stat().st_size
        if size != sizes[name]:
            raise CheckpointError(
                f"{path / name} has {size} bytes instead of {sizes[name]}; convert the model again"
            )
    return sizes


def _dense(path: Path, facts: Facts, sizes: Mapping[str, int]) -> Iterator[Tensor]:
    for name, entry in facts.mapping("dense").items():
        try:
            format, shape, offset = entry
            nbytes = matrix_bytes(format, tuple(shape))
            valid = offset >= 0 and offset + nbytes <= sizes[DENSE] and min(shape) > 0
        except (TypeError, KeyError, ValueError):
            valid = False
        if not valid:
            raise CheckpointError(f"{facts.source}: the entry of tensor {name!r} is damaged")
        yield Tensor(name, format, tuple(shape), path / DENSE, offset, nbytes)


class Run(NamedTuple):
    """Experts of a layer that are alike, in rows of an array that follow each other."""

    array: int
    first_row: int
    stride: int  # bytes of a row
    formats: list[str]  # of gate, up and down
    experts: Sequence[int]  # in the order of the rows


def _experts(
    path: Path, facts: Facts, config: ModelConfig, sizes: Mapping[str, int]
) -> Iterator[Tensor]:
    """Tensors inside the blobs. Each layer has [array number, first row, stride, formats]; or, if
    its experts differ in their formats, a list of these, each with the numbers of its experts."""
    everyone = list(range(config.num_experts))
    for layer, entry in facts.mapping("experts").items():
        try:
            is_mix = isinstance(entry[0], list)
            runs = [Run._make(run) for run in (entry if is_mix else [[*entry, everyone]])]
            layouts = [_layout(run, config, sizes) for run in runs]
            valid = sorted(chain.from_iterable(run.experts for run in runs)) == everyone
        except (TypeError, KeyError, ValueError, IndexError):
            valid = False
        if not valid:
            raise CheckpointError(f"{facts.source}: the entry of layer {layer} is damaged")
        for run, layout in zip(runs, layouts, strict=True):
            for row, expert in enumerate(run.experts, run.first_row):
                for part, tensor in layout._asdict().items():
                    name = f"layers.{layer}.experts.{expert}.{part}"
                    file, offset = path / array_file(run.array), row * run.stride + tensor.offset
                    yield Tensor(name, tensor.format, tensor.shape, file, offset, tensor.nbytes)


def _layout(run: Run, config: ModelConfig, sizes: Mapping[str, int]) -> ExpertLayout:
    """Of a run's experts. Raises what a damaged entry leads to."""
    if any(type(n) is not int for n in (run.array, run.first_row, run.stride, *run.experts)):
        raise TypeError("no whole numbers")
    layout = expert_layout(config.hidden_size, config.expert_size, *run.formats)
    end = (run.first_row + len(run.experts)) * run.stride
    if end > sizes[array_file(run.array)] or layout.nbytes > run.stride or run.first_row < 0:
        raise ValueError("beyond the file")
    return layout


def manifest_bytes(manifest: Mapping[str, Any]) -> bytes:
    return (json.dumps(manifest, indent=1, sort_keys=False) + "\n").encode()
