"""Pieces: a new Hugging Face checkpoint, written from parts of files that are there already, and
from what is computed as it is written."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tiered.checkpoints.checkpoint import Tensor
from tiered.formats import open_checkpoint
from tiered.formats import safetensors as hugging_face
from tiered.weights.convert import TOKENIZER_FILES, check_space

CHUNK = 16 << 20  # bytes copied at once
_DTYPES = {"f32": "F32", "f16": "F16", "bf16": "BF16"}

Progress = Callable[[int, int], None]  # bytes written so far, bytes in all


class Range(NamedTuple):
    """Bytes of a file that is there."""

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


def whole(tensor: Tensor, name: str) -> Piece:
    dtype = _DTYPES.get(tensor.format, tensor.format)
    return Piece(name, dtype, tensor.shape, [Range(tensor.file, tensor.offset, tensor.nbytes)])


def write_checkpoint(
    source: Path,
    destination: Path,
    files: Mapping[str, Sequence[Piece]],
    config_json: Mapping[str, Any],
    progress: Progress | None = None,
) -> Path:
    """Write the new folder `destination`: files of pieces, by name, the source's tokenizer, and
    `config_json`. Raises OSError if the disk is too small.

    The folder gets its name when it is complete and opens. What is interrupted is removed; should
    even that fail, it has no config.json and does not open.
    """
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
        _write_rest(source, unfinished, files, config_json)
        open_checkpoint(unfinished).close()
        unfinished.rename(destination)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    return destination


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
        data = file.read(min(CHUNK, nbytes))
        if not data:
            raise OSError(f"{file.name}: the file became shorter while it was read")
        out.write(data)
        nbytes -= len(data)
        yield len(data)


def _write_rest(
    source: Path,
    folder: Path,
    files: Mapping[str, Sequence[Piece]],
    config_json: Mapping[str, Any],
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
    text = json.dumps(config_json, indent=2) + "\n"
    (folder / "config.json").write_text(text, encoding="utf-8")
