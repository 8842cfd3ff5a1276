"""Write a Hugging Face checkpoint with fewer experts: the others are left out, or merged into those
that stay; routers are cut."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from tiered import models
from tiered.checkpoints.checkpoint import CheckpointError, Tensor
from tiered.checkpoints.json_file import read_json
from tiered.checkpoints.tensor_names import Names, drafting_layer
from tiered.config import ModelConfig
from tiered.formats import open_checkpoint
from tiered.formats import safetensors as hugging_face
from tiered.weights.convert import check_free
from tiered.weights.merge import Block, Groups, Member, check_floats, mean
from tiered.weights.pieces import Made, Piece, Progress, Range, whole, write_checkpoint

# How config.json spells it.
COUNTS = "num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"

Kept = Mapping[int, Sequence[int]]  # by layer: the experts that stay, in ascending order

# Canonical names whose first axis counts experts.
OF_EXPERTS = re.compile(r"\.(experts\.\*.*|experts_bias.*|router(_bias|_correction|_scales)?)$")
NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


def check_sparse(source: Path, destination: Path, doing: str) -> ModelConfig:
    """The facts of `source`, whose experts are to be `doing` (pruned, ...). ValueError if it is
    not a Hugging Face folder with experts, FileExistsError if there is a destination already."""
    check_free(destination)
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


def prune(
    source: Path,
    destination: Path,
    kept: Kept,
    progress: Progress | None = None,
    groups: Groups | None = None,
) -> Path:
    """Write `source` with the experts `kept` (as many in each layer) to the new folder
    `destination`; tensors keep their bytes, but for experts that are the mean of one of `groups`.
    What is interrupted never opens.
    """
    num_experts = len(next(iter(kept.values())))
    config = check_prunable(source, destination, num_experts)
    files = pruned_files(source, config, kept, groups)
    return write_checkpoint(source, destination, files, with_experts(source, num_experts), progress)


def with_experts(source: Path, num_experts: int) -> dict[str, Any]:
    """The source's config.json with another number of experts."""
    values = read_json(source / "config.json")
    for part in (values, values.get("text_config", {})):
        part |= {name: num_experts for name in COUNTS if name in part}
    return values


def pruned_files(
    source: Path, config: ModelConfig, kept: Kept, groups: Groups | None = None
) -> dict[str, list[Piece]]:
    """What each file of `source` becomes in a checkpoint with the experts `kept`."""
    stored = {
        file.name: list(hugging_face.read_header(file))
        for file in hugging_face.weight_files(source)
    }
    names = models.find(config.model_type, source / "config.json").HF_NAMES
    cutter = _Cutter(names, config, kept, groups or {}, chain.from_iterable(stored.values()))
    return {name: list(cutter.pieces(tensors)) for name, tensors in stored.items()}


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
            pattern = self.names.get(NUMBER.sub("{}", tensor.name))
            numbers = list(map(int, NUMBER.findall(tensor.name)))
            if pattern is None:
                if re.search(r"expert|router|\.gate\.", tensor.name):
                    where = f"{tensor.file}: no rule says how to cut tensor {tensor.name!r}"
                    raise CheckpointError(where)
                yield whole(tensor, tensor.name)
            elif drafting_layer(pattern, numbers, self.config.num_layers) is not None:
                continue  # only drafts tokens, with experts that nobody measured
            elif ".experts.{}." in pattern:
                layer, expert = numbers
                if expert in self.kept[layer]:
                    yield self._one(tensor, pattern, layer, expert)
            elif OF_EXPERTS.search(pattern):
                yield self._rows(tensor, pattern, numbers[0])
            else:
                yield whole(tensor, tensor.name)

    def _one(self, tensor: Tensor, pattern: str, layer: int, expert: int) -> Piece:
        """A matrix of one expert."""
        name = _renumbered(tensor.name, self.kept[layer].index(expert))
        members = self.groups.get(layer, {}).get(expert, ())
        if len(members) < 2:
            return whole(tensor, name)
        others = [self.stored[_renumbered(tensor.name, member.expert)] for member in members]
        for other in others:
            check_floats(other)
        blocks = [Block(other, other.offset, other.shape) for other in others]
        return whole(tensor, name)._replace(parts=[_mean(blocks, members, pattern, tensor.nbytes)])

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
        return whole(tensor, tensor.name)._replace(shape=shape, parts=parts)


def _mean(blocks: Sequence[Block], members: Sequence[Member], pattern: str, nbytes: int) -> Made:
    return Made(lambda: mean(blocks, members, pattern), nbytes)


def _renumbered(name: str, expert: int) -> str:
    """The name with another number for the expert, the last of its numbers."""
    number = list(NUMBER.finditer(name))[-1]
    return f"{name[: number.start()]}{expert}{name[number.end() :]}"
