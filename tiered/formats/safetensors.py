"""Hugging Face folders: config.json beside one or many *.safetensors.

Layout: https://huggingface.co/docs/safetensors: 8 bytes of header length, a JSON header, tensors.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tiered import models
from tiered.checkpoints import packings
from tiered.checkpoints.checkpoint import Checkpoint, CheckpointError, Tensor
from tiered.checkpoints.expected_tensors import check_tensors
from tiered.checkpoints.facts import Facts
from tiered.checkpoints.json_file import parse_json, read_json
from tiered.checkpoints.tensor_names import canonical_tensors, with_drafts

INDEX = "model.safetensors.index.json"
_MAX_HEADER = 100_000_000  # bytes; the safetensors library has the same limit
_FORMATS = {"F32": "f32", "F16": "f16", "BF16": "bf16"}
_VALUE_BYTES = {
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E8M0": 1,
    "F64": 8,
    "I64": 8,
    "U64": 8,
    "F32": 4,
    "I32": 4,
    "U32": 4,
    "F16": 2,
    "BF16": 2,
}


def matches(path: Path) -> bool:
    return path.is_dir() and (path / "config.json").exists()


def open_checkpoint(path: Path, drafts: bool = False) -> Checkpoint:
    values = read_json(path / "config.json")
    _add_end_tokens(path, values)
    facts = Facts(values, path / "config.json")
    architecture = models.find(facts.text("model_type"), facts.source)
    config = models.read_config(architecture.from_hf, facts)
    stored = [tensor for file in weight_files(path) for tensor in read_header(file)]
    stored = packings.join(stored, facts)
    tensors = canonical_tensors(stored, architecture.HF_NAMES, config.num_layers, drafts)
    config = with_drafts(config, tensors)
    if facts.flag("tie_word_embeddings", default="head" not in tensors):
        tensors.pop("head", None)
    elif "head" not in tensors:
        raise CheckpointError(f"{path}: tensor 'lm_head.weight' is missing")
    check_tensors(path, config, tensors)
    return Checkpoint(path, config, tensors, values, path)


def read_header(file: Path) -> Iterator[Tensor]:
    """The tensors of one file, with the file's own names."""
    with file.open("rb") as opened:
        size = os.fstat(opened.fileno()).st_size
        length = int.from_bytes(opened.read(8), "little")
        if size < 8 or length > min(size - 8, _MAX_HEADER):
            raise CheckpointError(
                f"{file}: the header claims {length} bytes, but the file has {size}: it is "
                "truncated or no safetensors file"
            )
        header = parse_json(opened.read(length), file)
    for name, entry in header.items():
        if name != "__metadata__":
            yield _tensor(file, name, entry, start=8 + length, size=size)


def _tensor(file: Path, name: str, entry: Any, start: int, size: int) -> Tensor:
    try:
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        numbers = [*shape, begin, end]
        valid = isinstance(dtype, str) and all(type(n) is int and n >= 0 for n in numbers)
    except (TypeError, KeyError, ValueError):
        valid = False
    if not valid:
        raise CheckpointError(f"{file}: the header's entry for tensor {name!r} is damaged")
    if not begin <= end <= size - start:
        raise CheckpointError(
            f"{file}: tensor {name!r} ends at byte {start + end}, but the file has only {size}: "
            "it is truncated or damaged; download it again"
        )
    if dtype in _VALUE_BYTES and math.prod(shape) * _VALUE_BYTES[dtype] != end - begin:
        raise CheckpointError(
            f"{file}: tensor {name!r} of {dtype} {shape} cannot have {end - begin} bytes"
        )
    return Tensor(name, _FORMATS.get(dtype, dtype), tuple(shape), file, start + begin, end - begin)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that belong to the model."""
    if (folder / INDEX).exists():
        names = read_json(folder / INDEX).get("weight_map")
        if not isinstance(names, dict) or not all(isinstance(n, str) for n in names.values()):
            raise CheckpointError(f"{folder / INDEX}: 'weight_map' is damaged")
        files = [folder / name for name in sorted(set(names.values()))]
        for file in files:
            if file.parent != folder or not file.is_file():
                raise CheckpointError(f"{folder / INDEX} names {file.name!r}, which is missing")
        return files
    if (folder / "model.safetensors").exists():
        return [folder / "model.safetensors"]
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{folder} has a config.json, but no *.safetensors")
    return files


def _add_end_tokens(folder: Path, values: dict[str, Any]) -> None:
    """generation_config.json often names more tokens that end a text than config.json."""
    file = folder / "generation_config.json"
    if file.is_file():
        more = Facts(read_json(file), file).integers("eos_token_id")
        own = Facts(values, folder / "config.json").integers("eos_token_id")
        values["eos_token_id"] = list(dict.fromkeys(own + more))
