"""Stored students: a layer's trained weights in a safetensors file, under the names and in the
number formats that the new checkpoint has them in."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tiered import models
from tiered.checkpoints.checkpoint import Checkpoint, Tensor
from tiered.checkpoints.tensor_names import drafting_layer
from tiered.distilling.pool import Pool
from tiered.distilling.target import Target
from tiered.formats import safetensors as hugging_face
from tiered.weights.pieces import Piece, whole
from tiered.weights.prune import NUMBER, pruned_files

KINDS = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
PARTS = "gate", "up", "down"

Named = dict[str, torch.Tensor]


def kind_of(checkpoint: Checkpoint, layer: int) -> torch.dtype:
    """The number format of a layer's experts."""
    return KINDS[checkpoint.tensors[f"layers.{layer}.experts.0.gate"].format]


def layer_tensors(checkpoint: Checkpoint, target: Target, layer: int, pool: Pool) -> Named:
    """What the new checkpoint has instead of the layer's experts and router."""
    if target.is_dense:
        found = _dense_tensors(checkpoint, target, layer, pool)
    else:
        found = dict(_sparse_tensors(checkpoint, target, layer, pool))
    return {name: tensor.contiguous() for name, tensor in found.items()}


def _dense_tensors(checkpoint: Checkpoint, target: Target, layer: int, pool: Pool) -> Named:
    names = dense_names(target)
    kind = kind_of(checkpoint, layer)
    found = {
        names[f"layers.{{}}.ffn.{part}"].format(layer): getattr(pool, part)[0].to(kind)
        for part in PARTS
    }
    # Where attention has biases at all, transformers wants one of the output, too: in all layers.
    others = range(target.teacher.num_layers) if layer == target.layers[0] else ()
    for each in {layer, *(n for n in others if not target.teacher.is_sparse(n))}:
        prefix = f"layers.{each}."
        if prefix + "q_bias" in checkpoint.tensors and prefix + "o_bias" not in checkpoint.tensors:
            name = names["layers.{}.o_bias"].format(each)
            found[name] = torch.zeros(target.teacher.hidden_size, dtype=kind)
    return found


def dense_names(target: Target) -> Mapping[str, str]:
    """Stored names of a dense model, by canonical ones."""
    architecture = models.find(target.student.model_type, Path("config.json"))
    return {canonical: name for name, canonical in architecture.HF_NAMES.items()}


def _sparse_tensors(
    checkpoint: Checkpoint, target: Target, layer: int, pool: Pool
) -> Iterator[tuple[str, torch.Tensor]]:
    for tensor, pattern, numbers in stored_tensors(checkpoint):
        if not pattern.startswith("layers.{}.") or numbers[0] != layer:
            continue
        name = pattern.removeprefix("layers.{}.")
        values = None
        if name == "router":
            values = pool.router
        elif name == "router_correction" and pool.correction is not None:
            values = pool.correction.reshape([n if n == 1 else -1 for n in tensor.shape])
        elif name.startswith("experts.{}.") and numbers[1] < len(pool.gate):
            values = getattr(pool, name.removeprefix("experts.{}."))[numbers[1]]
        elif name.startswith("experts.*."):
            parts = name.removeprefix("experts.*.").split("|")
            values = torch.cat([getattr(pool, part) for part in parts], 1)
        if values is not None:
            yield tensor.name, values.to(KINDS[tensor.format])


def stored_tensors(checkpoint: Checkpoint) -> Iterator[tuple[Tensor, str, list[int]]]:
    """The source's tensors as its files have them, canonical patterns ("": none) and numbers."""
    names = models.find(checkpoint.config.model_type, checkpoint.path).HF_NAMES
    for file in hugging_face.weight_files(checkpoint.path):
        for tensor in hugging_face.read_header(file):
            pattern = names.get(NUMBER.sub("{}", tensor.name), "")
            yield tensor, pattern, list(map(int, NUMBER.findall(tensor.name)))


def write_layer(file: Path, tensors: Named, report: Mapping[str, Any]) -> None:
    """Write them with a report; the file is there only when it is complete."""
    partial = file.with_name(file.name + ".partial")
    save_file(tensors, partial, {"format": "pt", "report": json.dumps(report)})
    with partial.open("rb+") as opened:
        os.fsync(opened.fileno())
    os.replace(partial, file)


def read_report(file: Path) -> dict[str, Any]:
    with safe_open(file, "pt") as opened:
        report: dict[str, Any] = json.loads(opened.metadata()["report"])
    return report


def read_pool(checkpoint: Checkpoint, target: Target, layer: int, file: Path) -> Pool:
    """What `write_layer` wrote of `layer_tensors`."""
    tensors = {name: tensor.float() for name, tensor in load_file(file).items()}
    if target.is_dense:
        names = dense_names(target)
        return Pool(*(tensors[names[f"layers.{{}}.ffn.{p}"].format(layer)][None] for p in PARTS))
    count = target.student.num_experts
    found: dict[str, Any] = {part: [None] * count for part in PARTS}
    for tensor, pattern, numbers in stored_tensors(checkpoint):
        if tensor.name not in tensors:
            continue
        values, name = tensors[tensor.name], pattern.removeprefix("layers.{}.")
        if name.startswith("experts.{}."):
            found[name.removeprefix("experts.{}.")][numbers[1]] = values
        elif name.startswith("experts.*."):
            parts = name.removeprefix("experts.*.").split("|")
            for part, matrices in zip(parts, values.chunk(len(parts), 1), strict=True):
                found[part] = list(matrices)
        else:
            found[name] = values.reshape(-1) if name == "router_correction" else values
    gate, up, down = (torch.stack(found[part]) for part in PARTS)
    return Pool(gate, up, down, found["router"], found.get("router_correction"))


def student_files(
    checkpoint: Checkpoint, target: Target, layer_files: Mapping[int, Path]
) -> dict[str, list[Piece]]:
    """The new checkpoint: files by name. Without layer files, what it needs of the source."""
    new = {
        layer: [whole(tensor, tensor.name) for tensor in hugging_face.read_header(file)]
        for layer, file in layer_files.items()
    }
    if target.is_dense:
        return _dense_files(checkpoint, target, new)
    kept = {layer: range(target.student.num_experts) for layer in target.layers}
    by_name = {piece.name: piece for pieces in new.values() for piece in pieces}
    return {
        name: [by_name.get(piece.name, piece) for piece in pieces]
        for name, pieces in pruned_files(checkpoint.path, target.teacher, kept).items()
    }


def _dense_files(
    checkpoint: Checkpoint, target: Target, new: Mapping[int, list[Piece]]
) -> dict[str, list[Piece]]:
    """A layer's new tensors go to the file that has the first of its old ones."""
    known, files = dense_names(target), dict[str, list[Piece]]()
    left = dict(new)
    for tensor, pattern, numbers in stored_tensors(checkpoint):
        if drafting_layer(pattern, numbers, target.teacher.num_layers) is not None:
            continue
        pieces = files.setdefault(tensor.file.name, [])
        if pattern in known:
            pieces.append(whole(tensor, tensor.name))
        elif numbers:
            pieces += left.pop(numbers[0], [])
    return {name: pieces for name, pieces in files.items() if pieces}
