"""Write a Hugging Face checkpoint with fewer experts: the others are left out, routers are cut."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tiered import models
from tiered.checkpoints.checkpoint import CheckpointError, Tensor
from tiered.checkpoints.json_file import read_json
from tiered.config import ModelConfig
from tiered.formats import open_checkpoint
from tiered.formats import safetensors as hugging_face
from tiered.weights.pieces import Piece, Progress, whole, write_checkpoint

# How config.json spells it.
COUNTS = "num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"

Kept = Mapping[int, Sequence[int]]  # by layer: the experts that stay, in ascending order

# Canonical names whose first axis counts experts.
OF_EXPERTS = re.compile(r"\.(experts\.\*.*|experts_bias.*|router(_bias|_correction|_scales)?)$")
NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


def check_sparse(source: Path, destination: Path, doing: str) -> ModelConfig:
    """The facts of `source`, whose experts are to be `doing` (pruned, ...). ValueError if it is
    not a Hugging Face folder with experts, FileExistsError if there is a destination already."""
    if destination.exists():
        raise FileExistsError(f"{destination} exists already; delete it or choose another name")
    if source.exists() and not hugging_face.matches(source):
        raise ValueError(
            f"{source} is no Hugging Face folder (config.json and *.safetensors): only those can "
            f"be {doing}; give the model's original checkpoint"
        )
    with open_checkpoint(source) as checkpoint:
        if not checkpoint.config.sparse_layers:
            raise ValueError(f"{source} is a dense model: it has no experts")
        return checkpoint.config


def check_prunable(
    source: Path, destination: Path, num_experts: int, doing: str = "pruned"
) -> ModelConfig:
    """The source's facts. ValueError or FileExistsError if it cannot be pruned so."""
    config = check_sparse(source, destination, doing)
    if not config.top_k <= num_experts < config.num_experts:
        raise ValueError(
            f"{source} has {config.num_experts} experts, {config.top_k} per token: --experts "
            f"must be {config.top_k} to {config.num_experts - 1}, not {num_experts}"
        )
    if read_json(source / "config.json").get("n_group", 1) not in (1, None):
        raise ValueError(f"{source} routes within groups of experts, which cannot be cut")
    return config


def prune(source: Path, destination: Path, kept: Kept, progress: Progress | None = None) -> Path:
    """Write `source` with the experts `kept` (as many in each layer) to the new folder
    `destination`; tensors keep their bytes. What is interrupted never opens.
    """
    num_experts = len(next(iter(kept.values())))
    config = check_prunable(source, destination, num_experts)
    files = {
        file.name: list(pruned_pieces(file, source, config, kept))
        for file in hugging_face.weight_files(source)
    }
    return write_checkpoint(source, destination, files, with_experts(source, num_experts), progress)


def with_experts(source: Path, num_experts: int) -> dict[str, Any]:
    """The source's config.json with another number of experts."""
    values = read_json(source / "config.json")
    for part in (values, values.get("text_config", {})):
        part |= {name: num_experts for name in COUNTS if name in part}
    return values


def pruned_pieces(file: Path, source: Path, config: ModelConfig, kept: Kept) -> Iterator[Piece]:
    """What of a file of `source` a checkpoint with the experts `kept` has."""
    names = models.find(config.model_type, source / "config.json").HF_NAMES
    for tensor in hugging_face.read_header(file):
        pattern = names.get(NUMBER.sub("{}", tensor.name))
        numbers = list(map(int, NUMBER.findall(tensor.name)))
        if pattern is None:
            if re.search(r"expert|router|\.gate\.", tensor.name):
                raise CheckpointError(f"{file}: no rule says how to cut tensor {tensor.name!r}")
            yield whole(tensor, tensor.name)
        elif pattern.startswith("layers.") and numbers[0] >= config.num_layers:
            continue  # only drafts tokens, with experts that nobody measured
        elif ".experts.{}." in pattern:
            layer, expert = numbers
            if expert in kept[layer]:
                yield whole(tensor, _renumbered(tensor.name, kept[layer].index(expert)))
        elif OF_EXPERTS.search(pattern):
            yield _rows(tensor, kept[numbers[0]], config.num_experts)
        else:
            yield whole(tensor, tensor.name)


def _renumbered(name: str, expert: int) -> str:
    """The name with another number for the expert, the last of its numbers."""
    number = list(NUMBER.finditer(name))[-1]
    return f"{name[: number.start()]}{expert}{name[number.end() :]}"


def _rows(tensor: Tensor, experts: Sequence[int], num_experts: int) -> Piece:
    """A tensor whose first axis, but for axes of 1, counts experts."""
    ones = next((axis for axis, size in enumerate(tensor.shape) if size != 1), 0)
    if tensor.shape[ones] != num_experts:
        raise CheckpointError(
            f"{tensor.file}: tensor {tensor.name!r} has {tensor.shape[ones]} rows, but the model "
            f"has {num_experts} experts"
        )
    step = tensor.nbytes // num_experts
    ranges = [(tensor.offset + expert * step, step) for expert in experts]
    shape = (*tensor.shape[:ones], len(experts), *tensor.shape[ones + 1 :])
    return whole(tensor, tensor.name)._replace(shape=shape, ranges=ranges)
