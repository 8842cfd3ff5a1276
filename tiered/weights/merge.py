"""Experts that become one: the mean of their weights, after their neurons were put in one order.

As in M-SMoE (arXiv 2310.01334): a neuron of an expert is a row of gate, a row of up and a column of
down; their order means nothing, so an expert is permuted until its neurons stand where those stand
that they are most like. Experts count as often as they were chosen.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from tiered.checkpoints.checkpoint import Checkpoint, CheckpointError, Tensor
from tiered.weights.dequantize import dequantize, float32_to_bf16

FLOATS = "f32", "f16", "bf16"


class Member(NamedTuple):
    """An expert of a group: its share of the mean, and which of its neurons go where."""

    expert: int
    share: float
    order: np.ndarray  # int64 [expert_size]


Groups = Mapping[int, Mapping[int, Sequence[Member]]]  # by layer and kept expert, itself the first


def align(
    checkpoint: Checkpoint,
    groups: Mapping[int, Mapping[int, Sequence[int]]],
    counts: np.ndarray,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Groups:
    """Shares and orders for experts that join others: `groups[layer][kept]` are those that join
    `kept`; `counts` is [num_layers, num_experts], how often each was chosen."""
    total = sum(len(others) for layer in groups.values() for others in layer.values())
    result: dict[int, dict[int, list[Member]]] = {}
    done = 0
    for layer, joined in groups.items():
        result[layer] = {}
        for kept, others in joined.items():
            experts = [kept, *others]
            shares = counts[layer, experts] + 1e-6  # equal ones, if nobody was chosen
            shares = shares / shares.sum()
            orders = [np.arange(checkpoint.config.expert_size)]
            own = neurons(checkpoint, layer, kept) if others else np.empty(0)
            for other in others:
                orders.append(match(own @ neurons(checkpoint, layer, other).T))
                done += 1
                progress(done, total)
            members = zip(experts, shares.tolist(), orders, strict=True)
            result[layer][kept] = [Member(*member) for member in members]
    return result


def neurons(checkpoint: Checkpoint, layer: int, expert: int) -> np.ndarray:
    """Everything that belongs to each neuron: float32 [expert_size, 3 * hidden_size]."""
    gate, up, down = (
        checkpoint.float32(f"layers.{layer}.experts.{expert}.{name}")
        for name in ("gate", "up", "down")
    )
    return np.concatenate([gate, up, down.T], axis=1)


def match(likeness: np.ndarray) -> np.ndarray:
    """For each row a column of its own, the most alike first: int64 [n], of float32 [n, n].

    The pair that is most alike is taken, then the next of what is left, and so on. (The best
    assignment of all, by the Hungarian algorithm, takes n ** 3 steps.)
    """
    result = np.empty(len(likeness), np.int64)
    rows, columns = np.arange(len(likeness)), np.arange(len(likeness))
    while len(rows):
        left = likeness[np.ix_(rows, columns)]
        column, row = left.argmax(axis=1), left.argmax(axis=0)
        mutual = row[column] == np.arange(len(rows))  # the most alike pair of all is, always
        result[rows[mutual]] = columns[column[mutual]]
        rows, columns = rows[~mutual], np.delete(columns, column[mutual])
    return result


class Block(NamedTuple):
    """What a stored tensor has of one expert."""

    tensor: Tensor
    offset: int  # in the file
    shape: tuple[int, ...]

    def values(self) -> np.ndarray:
        """float32, in `shape`."""
        count = int(np.prod(self.shape))
        nbytes = count * (4 if self.tensor.format == "f32" else 2)
        data = np.fromfile(self.tensor.file, np.uint8, nbytes, offset=self.offset)
        if len(data) < nbytes:
            raise OSError(f"{self.tensor.file}: the file became shorter while it was read")
        return dequantize(data, self.tensor.format, self.shape)


def mean(blocks: Sequence[Block], members: Sequence[Member], pattern: str) -> bytes:
    """The mean of what experts have in a tensor, in its own number format; `pattern` is its
    canonical name."""
    total = np.zeros(blocks[0].shape, np.float32)
    for block, member in zip(blocks, members, strict=True):
        values = block.values()
        axis = neuron_axis(pattern, values.ndim)
        if axis is not None:
            values = values.take(neuron_indices(pattern, member.order), axis)
        total += np.float32(member.share) * values
    return encode(total, blocks[0].tensor.format)


def check_floats(tensor: Tensor) -> None:
    """CheckpointError if values of the tensor cannot be averaged and written again."""
    if tensor.format not in FLOATS:
        raise CheckpointError(
            f"{tensor.file}: tensor {tensor.name!r} has type {tensor.format.upper()}, whose means "
            "cannot be written; merge a checkpoint in F32, F16 or BF16, or prune without --merge"
        )


def neuron_axis(pattern: str, num_axes: int) -> int | None:
    """The axis of an expert's block that counts its neurons; None: it has none."""
    if not re.search(r"\.(gate|up|down)\b", pattern):
        return None  # of the router
    is_down = ".down" in pattern
    if num_axes == 1:  # a bias
        return None if is_down else 0
    return int(is_down != pattern.endswith("^T"))


def neuron_indices(pattern: str, order: np.ndarray) -> np.ndarray:
    if "gate|up" in pattern:
        return np.concatenate([order, order + len(order)])
    if "gate/up" in pattern:
        return np.stack([2 * order, 2 * order + 1], axis=1).reshape(-1)
    return order


def encode(values: np.ndarray, format: str) -> bytes:
    """float32 as f32, f16 or bf16, rounded to the nearest, ties to even."""
    if format == "bf16":
        return float32_to_bf16(values).tobytes()
    return values.astype({"f32": "<f4", "f16": "<f2"}[format]).tobytes()
