"""GGUF files, whole or split, as llama.cpp writes them."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from tiered import models
from tiered.checkpoints.checkpoint import Checkpoint, CheckpointError, Tensor
from tiered.checkpoints.expected_tensors import check_tensors
from tiered.checkpoints.gguf_header import MAGIC, Metadata, read_header
from tiered.checkpoints.rope import MOST_SCALE
from tiered.checkpoints.tensor_names import canonical_tensors, with_drafts
from tiered.config import ModelConfig, RopeConfig

EMBEDDING = "token_embd.weight"
ROPE_FACTORS = "rope_factors", "rope_factors_short", "rope_factors_long"
QUERY_NORM = ".attn_q_norm.weight"
_PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})(\.gguf)", re.DOTALL)


def matches(path: Path) -> bool:
    if path.is_dir():
        return not (path / "config.json").exists() and any(path.glob("*.gguf"))
    if path.suffix == ".gguf":
        return True
    with path.open("rb") as opened:
        return opened.read(4) == MAGIC


def open_checkpoint(path: Path, drafts: bool = False) -> Checkpoint:
    files = model_files(path)
    headers = [read_header(file) for file in files]
    values = headers[0].values
    num_parts = values.get("split.count", 1)
    if num_parts != len(files) and (num_parts or len(files) > 1):
        raise CheckpointError(
            f"{files[0]}: one of {num_parts} parts, but its name says {len(files)}; keep the "
            "names that the parts were downloaded with"
        )
    stored = [tensor for header in headers for tensor in header.tensors]
    values |= _told_by_tensors(values.get("general.architecture"), stored)
    metadata = Metadata(values)
    architecture, facts = models.find_gguf(metadata, files[0])
    config = models.read_config(architecture.from_gguf, facts)
    tensors = canonical_tensors(stored, architecture.GGUF_NAMES, config.num_layers, drafts)
    config = with_drafts(config, tensors)
    factors = [tensors.pop(name, None) for name in ROPE_FACTORS]
    checkpoint = Checkpoint(path, config, tensors, metadata, _tokenizer(values))
    checkpoint.config = _with_rope_factors(checkpoint, *factors)
    check_tensors(files[0], config, tensors)
    return checkpoint


def _told_by_tensors(architecture: Any, stored: list[Tensor]) -> dict[str, Any]:
    """Facts that the header's keys do not tell, or not always."""
    facts: dict[str, Any] = {
        f"{architecture}.vocab_size": tensor.shape[0]
        for tensor in stored
        if tensor.name == EMBEDDING
    }
    has_norms = any(tensor.name.endswith(QUERY_NORM) for tensor in stored)
    return facts | {f"{architecture}.attention.has_qk_norm": has_norms}


def _tokenizer(values: dict[str, Any]) -> Metadata:
    return Metadata({key: value for key, value in values.items() if key.startswith("tokenizer.")})


def model_files(path: Path) -> list[Path]:
    """The file, or all parts of a split one; of a folder, those of the one model in it."""
    return _parts(_only_model(path) if path.is_dir() else path)


def _only_model(folder: Path) -> Path:
    """The one model in a folder; the first part of a split one."""
    firsts = []
    for file in sorted(folder.glob("*.gguf")):
        part = _PART.fullmatch(file.name)
        if part is None or int(part[2]) == 1:
            firsts.append(file)
    if len(firsts) != 1:
        listed = ", ".join(file.name for file in firsts) or "none that is a first part"
        raise CheckpointError(f"{folder} must hold one GGUF model, not {listed}")
    return firsts[0]


def _parts(path: Path) -> list[Path]:
    """All parts of a split file, given any one of them."""
    part = _PART.fullmatch(path.name)
    if part is None:
        return [path]
    stem, _, count, suffix = part.groups()
    files = []
    for number in range(1, int(count) + 1):
        files.append(path.with_name(f"{stem}-{number:05}-of-{count}{suffix}"))
        if not files[-1].exists():
            raise CheckpointError(f"{path}: one of {int(count)} parts, but {files[-1]} is missing")
    return files


def _with_rope_factors(
    checkpoint: Checkpoint, factors: Tensor | None, short: Tensor | None, long: Tensor | None
) -> ModelConfig:
    """Llama-3 scaling comes as a tensor with one divisor per frequency, LongRoPE as two."""
    config = checkpoint.config  # where layers differ, only some have it
    rope = (config.full_shape or config.own_shape).rope
    if short is not None and long is not None:
        rope = replace(rope, inv_freq_scale=_factors(checkpoint, short, rope))
        rope = replace(rope, long_inv_freq_scale=_factors(checkpoint, long, rope))
    elif factors is not None:
        scale = _factors(checkpoint, factors, rope)
        if rope.inv_freq_scale:
            scale = tuple(a * b for a, b in zip(scale, rope.inv_freq_scale, strict=True))
        rope = replace(rope, inv_freq_scale=scale)
    else:
        return config
    if config.full_shape is not None:
        return replace(config, full_shape=replace(config.full_shape, rope=rope))
    return replace(config, rope=rope)


def _factors(checkpoint: Checkpoint, tensor: Tensor, rope: RopeConfig) -> tuple[float, ...]:
    half = rope.dim // 2
    if tensor.format != "f32" or tensor.shape != (half,):
        raise CheckpointError(
            f"{tensor.file}: tensor {tensor.name!r} must be F32 with {half} values"
        )
    scale = tuple(float(value) for value in checkpoint.view(tensor).view("<f4"))
    if not all(0 < value <= MOST_SCALE for value in scale):
        raise CheckpointError(f"{tensor.file}: tensor {tensor.name!r} is damaged")
    return scale
