"""compressed-tensors (LLM Compressor): INT4 and INT8 in words, INT8 and FP8 as they are.

Packed: weight_packed, int32 [rows, columns / n], integers plus half their range, lowest bits first;
weight_scale [rows, groups]; perhaps weight_zero_point, int32 [rows / n, groups], packed alike but
along the rows; weight_g_idx, int32 [columns]: the group of each column.
Else: weight, I8 or F8_E4M3 [rows, columns], and weight_scale [rows, 1], [1], or one per square.
https://github.com/vllm-project/compressed-tensors (compressors/).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np

from tiered.checkpoints.checkpoint import CheckpointError, Tensor
from tiered.checkpoints.facts import Facts
from tiered.checkpoints.packings import fp8
from tiered.checkpoints.quantized import (
    GROUP,
    Parts,
    block_format,
    blocks,
    by_column,
    check,
    check_groups,
    floats,
    join_parts,
    packed,
    take,
    words,
)

PACKED = "weight_packed", "weight_scale", "weight_zero_point", "weight_g_idx", "weight_shape"
PLAIN = "weight_scale", "weight"
_ACTIVATIONS = ".input_scale", ".input_zero_point", ".k_scale", ".v_scale"


def join(stored: list[Tensor], settings: Facts) -> list[Tensor]:
    stored = [tensor for tensor in stored if not tensor.name.endswith(_ACTIVATIONS)]
    stored = join_parts(stored, PACKED, _integers(settings).weight)
    return join_parts(stored, PLAIN, partial(_plain, size=_squares(settings)))


def _groups(settings: Facts) -> list[Facts]:
    """What config.json says of the weights of each group of layers."""
    found = []
    for name, group in settings.mapping("config_groups").items():
        if not isinstance(group, dict) or not isinstance(group.get("weights"), dict):
            raise settings.error(f"config_groups.{name}", group, "an object with 'weights'")
        found.append(Facts(group["weights"], settings.source))
    return found


def _integers(settings: Facts) -> Integers:
    forms = set()
    for weights in _groups(settings):
        bits = weights.integer("num_bits")
        forms.add(Integers(bits, weights.flag("symmetric", default=True)))
    if len(forms) != 1:
        raise CheckpointError(
            f"{settings.source}: config_groups has several kinds of weights, which is not "
            "supported; take a checkpoint with one, or a GGUF file"
        )
    return forms.pop()


def _squares(settings: Facts) -> tuple[int, int]:
    for weights in _groups(settings):
        if size := weights.integers("block_structure"):
            if len(size) != 2 or min(size) < 1:
                raise weights.error("block_structure", list(size), "two whole numbers")
            return size[0], size[1]
    return 1, 1


@dataclass(frozen=True)
class Integers:
    """Packed integers of one kind."""

    bits: int
    symmetric: bool

    def weight(self, name: str, parts: Parts) -> Tensor:
        codes, scales = take(parts, "weight_packed", "weight_packed", "weight_scale")
        if self.bits not in (4, 8) or codes.format != "I32" or len(codes.shape) != 2:
            raise CheckpointError(
                f"{codes.file}: tensor {codes.name!r} is {codes.format} of {self.bits} bits; "
                "supported are I32 [rows, words] of 4 or 8 bits"
            )
        in_word = 32 // self.bits
        rows, columns = codes.shape[0], codes.shape[1] * in_word
        groups = scales.shape[1] if len(scales.shape) == 2 else 0
        check(scales, ("bf16", "f16", "f32"), [(rows, groups)])
        check_groups(name, scales, groups, columns)
        pieces, zeros, order = [codes, scales], None, parts.get("weight_g_idx")
        if not self.symmetric:
            (zeros,) = take(parts, "weight_packed", "weight_zero_point")
            check(zeros, ("I32",), [(-(-rows // in_word), groups)])
            pieces.append(zeros)
        if order is not None:
            check(order, ("I32",), [(columns,)])
            pieces.append(order)
        size = columns // groups
        format = block_format(self.bits, self.symmetric, order is not None, size)
        unpack = partial(self._unpack, name, format, scales, columns)
        return packed(name, format, (rows, columns), tuple(pieces), unpack)

    def _unpack(
        self, name: str, format: str, scales: Tensor, columns: int,
        data: np.ndarray, scale_data: np.ndarray, *more: np.ndarray,
    ) -> np.ndarray:  # fmt: skip
        rows, groups = scales.shape
        codes = words(data, self.bits, columns * self.bits // 32)
        values = floats(scale_data, scales.format, scales.shape)
        zeros = np.full((rows, groups), 1 << (self.bits - 1), np.uint8)
        if not self.symmetric:
            across = np.ascontiguousarray(more[0].view(np.uint32).reshape(-1, groups).T)
            zeros = words(across.view(np.uint8), self.bits, across.shape[1]).T[:rows]
        if len(more) > (not self.symmetric):
            values, zeros = by_column(name, scales, more[-1], values, zeros)
        return blocks(codes, format, values, zeros)


def _plain(name: str, parts: Parts, size: tuple[int, int]) -> Tensor:
    weight, scales = take(parts, "weight_scale", "weight", "weight_scale")
    if weight.format != "I8":
        return fp8.scaled(name, weight, scales, size)
    if len(weight.shape) != 2 or weight.shape[1] % GROUP:
        raise CheckpointError(
            f"{weight.file}: tensor {weight.name!r} must be [rows, columns] with columns a "
            f"multiple of {GROUP}"
        )
    rows = weight.shape[0]
    check(scales, ("bf16", "f16", "f32"), [(rows, 1), (1,), (1, 1)])

    def unpack(data: np.ndarray, scale_data: np.ndarray) -> np.ndarray:
        values = floats(scale_data, scales.format, (-1, 1))
        values = np.broadcast_to(values, (rows, 1))
        codes = data.reshape(rows, -1) ^ 128
        return blocks(codes, "q8_0", values, np.full((rows, 1), 128, np.uint8))

    return packed(name, "q8_0", weight.shape, (weight, scales), unpack)
