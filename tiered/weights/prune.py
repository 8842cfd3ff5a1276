"""Write a Hugging Face checkpoint with fewer experts: the others are left out, or merged into those
that stay; routers are cut."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from tiered import models
from tiered.checkpoints.checkpoint import CheckpointError, Tensor
from tiered.checkpoints.json_file import read_json
from tiered.checkpoints.tensor_names import Names
from tiered.config import ModelConfig
from tiered.formats import open_checkpoint
from tiered.formats import safetensors as hugging_face
from tiered.weights.convert import TOKENIZER_FILES, check_free, check_space
from tiered.weights.merge import Block, Groups, Member, check_floats, mean

PIECE = 16 << 20  # bytes copied at once
# How config.json spells it.
COUNTS = "num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"

Kept = Mapping[int, Sequence[int]]  # by layer: the experts that stay, in ascending order
Progress = Callable[[int, int], None]  # bytes written so far, bytes in all

# Canonical names whose first axis counts experts.
_OF_EXPERTS = re.compile(r"\.(experts\.\*.*|experts_bias.*|router(_bias|_correction|_scales)?)$")
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
_DTYPES = {"f32": "F32", "f16": "F16", "bf16": "BF16"}


class Range(NamedTuple):
    """Bytes of an old file."""

    file: Path
    offset: int
    nbytes: int


class Made(NamedTuple):
    """Bytes that are computed when they are to be written."""

    make: Callable[[], bytes]
    nbytes: int


class Piece(NamedTuple):
    """A tensor of the new checkpoint, and what it is put together from."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    parts: list[Range | Made]

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)


def check_prunable(source: Path, destination: Path, num_experts: int) -> ModelConfig:
    """The source's facts. ValueError or FileExistsError if it cannot be pruned so."""
    check_free(destination)
    if source.exists() and not hugging_face.matches(source):
        raise ValueError(
            f"{source} is no Hugging Face folder (config.json and *.safetensors): only those can "
            "be pruned; prune the model's original checkpoint"
        )
    with open_checkpoint(source) as checkpoint:
        config = checkpoint.config
        if not config.sparse_layers:
            raise ValueError(f"{source} is a dense model: it has no experts")
        if not config.top_k <= num_experts < config.num_experts:
            raise ValueError(
                f"{source} has {config.num_experts} experts, {config.top_k} per token: --experts "
                f"must be {config.top_k} to {config.num_experts - 1}, not {num_experts}"
            )
        if checkpoint.metadata.get("n_group", 1) not in (1, None):
            raise ValueError(f"{source} routes within groups of experts, which cannot be cut")
    return config


def prune(
    source: Path,
    destination: Path,
    kept: Kept,
    progress: Progress | None = None,
    groups: Groups | None = None,
) -> Path:
    """Write `source` with the experts `kept` (as many in each layer) to the new folder
    `destination`; tensors keep their bytes, but for experts that are the mean of one of `groups`.

    The folder gets its name when it is complete and opens. What is interrupted is removed; should
    even that fail, it has no config.json and does not open.
    """
    num_experts = len(next(iter(kept.values())))
    config = check_prunable(source, destination, num_experts)
    stored = {
        file.name: list(hugging_face.read_header(file))
        for file in hugging_face.weight_files(source)
    }
    names = models.find(config.model_type, source / "config.json").HF_NAMES
    cutter = _Cutter(names, config, kept, groups or {}, chain.from_iterable(stored.values()))
    files = {name: list(cutter.pieces(tensors)) for name, tensors in stored.items()}
    parent = destination.absolute().parent
    parent.mkdir(parents=True, exist_ok=True)
    total = sum(piece.nbytes for pieces in files.values() for piece in pieces)
    check_space(destination, total)
    unfinished = parent / f".{destination.name}-{os.getpid()}"
    unfinished.mkdir()
    try:
        done = 0
        for name, pieces in files.items():
            for nbytes in write_tensors(unfinished / name, pieces):
                done += nbytes
                if progress is not None:
                    progress(done, total)
        _write_rest(source, unfinished, files, num_experts)
        open_checkpoint(unfinished).close()
        unfinished.rename(destination)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    return destination


class _Cutter:
    """Turns the tensors of the old checkpoint into those of the new one."""

    def __init__(
        self, names: Names, config: ModelConfig, kept: Kept, groups: Groups, all: Iterable[Tensor]
    ) -> None:
        self.names = names
        self.config = config
        self.kept = kept
        self.groups = groups
        self.stored = {tensor.name: tensor for tensor in all}

    def pieces(self, tensors: Iterable[Tensor]) -> Iterator[Piece]:
        for tensor in tensors:
            pattern = self.names.get(_NUMBER.sub("{}", tensor.name))
            numbers = list(map(int, _NUMBER.findall(tensor.name)))
            if pattern is None:
                if re.search(r"expert|router|\.gate\.", tensor.name):
                    where = f"{tensor.file}: no rule says how to cut tensor {tensor.name!r}"
                    raise CheckpointError(where)
                yield _whole(tensor, tensor.name)
            elif pattern.startswith("layers.") and numbers[0] >= self.config.num_layers:
                continue  # only drafts tokens, with experts that nobody measured
            elif ".experts.{}." in pattern:
                layer, expert = numbers
                if expert in self.kept[layer]:
                    yield self._one(tensor, pattern, layer, expert)
            elif _OF_EXPERTS.search(pattern):
                yield self._rows(tensor, pattern, numbers[0])
            else:
                yield _whole(tensor, tensor.name)

    def _one(self, tensor: Tensor, pattern: str, layer: int, expert: int) -> Piece:
        """A matrix of one expert."""
        name = _renumbered(tensor.name, self.kept[layer].index(expert))
        members = self.groups.get(layer, {}).get(expert, ())
        if len(members) < 2:
            return _whole(tensor, name)
        others = [self.stored[_renumbered(tensor.name, member.expert)] for member in members]
        for other in others:
            check_floats(other)
        blocks = [Block(other, other.offset, other.shape) for other in others]
        return _whole(tensor, name)._replace(parts=[_mean(blocks, members, pattern, tensor.nbytes)])

    def _rows(self, tensor: Tensor, pattern: str, layer: int) -> Piece:
        """A tensor whose first axis, but for axes of 1, counts experts."""
        experts, num_experts = self.kept[layer], self.config.num_experts
        ones = next((axis for axis, size in enumerate(tensor.shape) if size != 1), 0)
        if tensor.shape[ones] != num_experts:
            raise CheckpointError(
                f"{tensor.file}: tensor {tensor.name!r} has {tensor.shape[ones]} rows, but the "
                f"model has {num_experts} experts"
            )
        step, shape = tensor.nbytes // num_experts, tensor.shape[ones + 1 :]
        parts: list[Range | Made] = []
        for expert in experts:
            members = self.groups.get(layer, {}).get(expert, ())
            if len(members) < 2 or ".experts" not in pattern:
                parts.append(Range(tensor.file, tensor.offset + expert * step, step))
                continue
            check_floats(tensor)
            blocks = [Block(tensor, tensor.offset + m.expert * step, shape) for m in members]
            parts.append(_mean(blocks, members, pattern, step))
        shape = (*tensor.shape[:ones], len(experts), *shape)
        return _whole(tensor, tensor.name)._replace(shape=shape, parts=parts)


def _mean(blocks: Sequence[Block], members: Sequence[Member], pattern: str, nbytes: int) -> Made:
    return Made(lambda: mean(blocks, members, pattern), nbytes)


def _renumbered(name: str, expert: int) -> str:
    """The name with another number for the expert, the last of its numbers."""
    number = list(_NUMBER.finditer(name))[-1]
    return f"{name[: number.start()]}{expert}{name[number.end() :]}"


def _whole(tensor: Tensor, name: str) -> Piece:
    dtype = _DTYPES.get(tensor.format, tensor.format)
    return Piece(name, dtype, tensor.shape, [Range(tensor.file, tensor.offset, tensor.nbytes)])


def write_tensors(target: Path, pieces: Sequence[Piece]) -> Iterator[int]:
    """Write a safetensors file; yields how many bytes were copied, as it goes."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for piece in pieces:
        end = at + piece.nbytes
        header[piece.name] = dict(dtype=piece.dtype, shape=piece.shape, data_offsets=[at, end])
        at = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 64)
    with target.open("xb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for piece in pieces:
            for part in piece.parts:
                if isinstance(part, Made):
                    out.write(part.make())
                    yield part.nbytes
                    continue
                with part.file.open("rb") as file:
                    file.seek(part.offset)
                    yield from _copy(file, out, part.nbytes)
        out.flush()
        os.fsync(out.fileno())


def _copy(file: Any, out: Any, nbytes: int) -> Iterator[int]:
    while nbytes:
        data = file.read(min(PIECE, nbytes))
        if not data:
            raise OSError(f"{file.name}: the file became shorter while it was read")
        out.write(data)
        nbytes -= len(data)
        yield len(data)


def _write_rest(
    source: Path, folder: Path, files: Mapping[str, Sequence[Piece]], num_experts: int
) -> None:
    """The index, the tokenizer and, last, config.json: without it the folder does not open."""
    if (source / hugging_face.INDEX).exists():
        weight_map = {piece.name: name for name, pieces in files.items() for piece in pieces}
        total = sum(piece.nbytes for pieces in files.values() for piece in pieces)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / hugging_face.INDEX).write_text(json.dumps(index, indent=1), encoding="utf-8")
    for name in TOKENIZER_FILES:
        if name != "config.json" and (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    values = read_json(source / "config.json")
    for part in (values, values.get("text_config", {})):
        part |= {name: num_experts for name in COUNTS if name in part}
    (folder / "config.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
