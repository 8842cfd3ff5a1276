"""Quantized weights that files have in several tensors: what their packings share."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

import numpy as np

from cpu_kernels.formats import FORMATS
from tiered.checkpoints.checkpoint import CheckpointError, Packed, Tensor
from tiered.weights.dequantize import dequantize

GROUP = 32  # weights of the smallest block, which share a scale
Parts = dict[str, Tensor]


def join_parts(
    stored: list[Tensor], names: tuple[str, ...], weight: Callable[[str, Parts], Tensor]
) -> list[Tensor]:
    """Replaces tensors MODULE.part, for the parts in `names`, by weight(MODULE, {part: tensor}).

    A module without the first of `names` is not quantized: its tensors stay as they are.
    """
    modules: dict[str, Parts] = defaultdict(dict)
    for tensor in stored:
        module, _, part = tensor.name.rpartition(".")
        if part in names:
            modules[module][part] = tensor
    quantized = {module: parts for module, parts in modules.items() if names[0] in parts}
    inside = {tensor.name for parts in quantized.values() for tensor in parts.values()}
    plain = [tensor for tensor in stored if tensor.name not in inside]
    return plain + [weight(f"{module}.weight", parts) for module, parts in quantized.items()]


def take(parts: Parts, first: str, *names: str) -> list[Tensor]:
    """The parts `names`. CheckpointError if one is missing beside the part `first`."""
    for name in names:
        if name not in parts:
            tensor = parts[first]
            raise CheckpointError(
                f"{tensor.file}: tensor {tensor.name!r} has no {name!r} beside it: the checkpoint "
                "is incomplete, or not of the kind that config.json says"
            )
    return [parts[name] for name in names]


def check(tensor: Tensor, formats: tuple[str, ...], shapes: list[tuple[int, ...]]) -> None:
    """CheckpointError unless the tensor has one of these number formats and shapes."""
    if tensor.format not in formats or tensor.shape not in shapes:
        raise CheckpointError(
            f"{tensor.file}: tensor {tensor.name!r} is {tensor.format} {list(tensor.shape)}, but "
            f"must be {' or '.join(formats)} {' or '.join(str(list(shape)) for shape in shapes)}"
        )


def packed(
    name: str,
    format: str,
    shape: tuple[int, ...],
    parts: tuple[Tensor, ...],
    unpack: Callable[..., np.ndarray],
) -> Tensor:
    """The weight that `unpack` makes of its parts."""
    first, nbytes = parts[0], sum(part.nbytes for part in parts)
    return Tensor(name, format, shape, first.file, first.offset, nbytes, Packed(parts, unpack))


def words(data: np.ndarray, bits: int, columns: int) -> np.ndarray:
    """Unsigned integers of 4 or 8 bits, lowest first, from rows of 32-bit words: uint8
    [num_rows, columns of words * 32 / bits]."""
    rows: np.ndarray = data.reshape(-1, 4 * columns)
    if bits == 8:
        return rows
    return np.stack([rows & 15, rows >> 4], axis=-1).reshape(len(rows), -1)


def floats(data: np.ndarray, format: str, shape: tuple[int, ...]) -> np.ndarray:
    values: np.ndarray = dequantize(data, format, shape)
    return values


def block_format(bits: int, symmetric: bool, any_order: bool, size: int) -> str:
    """Whose blocks hold such integers in groups of `size`; float16 where none do. `any_order`:
    neighbouring columns may be of different groups."""
    if any_order or (bits == 8 and not symmetric):
        return "f16"
    if bits == 4 and size % FORMATS["int4_g128"].block_size == 0:
        return "int4_g128"
    return {(4, True): "q4_0", (4, False): "q4_1", (8, True): "q8_0"}[bits, symmetric]


def check_groups(name: str, scales: Tensor, groups: int, columns: int) -> None:
    """CheckpointError unless the groups of a row are as long as whole blocks."""
    if not groups or columns % groups or columns // groups % GROUP:
        raise CheckpointError(
            f"{scales.file}: {groups} groups in the {columns} columns of {name!r}: groups must be "
            f"multiples of {GROUP}"
        )


def by_column(
    name: str, scales: Tensor, order: np.ndarray, *groups: np.ndarray
) -> list[np.ndarray]:
    """Of arrays [rows, groups], what belongs to each column: `order` is int32 [columns]."""
    group = order.view(np.int32)
    if group.min() < 0 or group.max() >= groups[0].shape[1]:
        raise CheckpointError(f"{scales.file}: g_idx of {name!r} names a group that is not there")
    return [values[:, group] for values in groups]


def blocks(codes: np.ndarray, format: str, scales: np.ndarray, zeros: np.ndarray) -> np.ndarray:
    """Rows of scale * (code - zero), uint8 [num_bytes] of `format`.

    Codes are uint8 [rows, columns], scales and zeros [rows, groups]. In q4_0 and q8_0 the zero is
    8 and 128. q4_1 has scale * zero as float16: at most 1/256 of a scale off. In the others nothing
    is, but for the rounding of f16 itself.
    """
    size = codes.shape[1] // scales.shape[1]
    if format == "f16":
        zeros, scales = np.repeat(zeros, size, axis=1), np.repeat(scales, size, axis=1)
        values = scales * (codes.astype(np.float32) - zeros)
        exact: np.ndarray = values.astype(np.float16).reshape(-1).view(np.uint8)
        return exact
    block = FORMATS[format].block_size
    scales, zeros = [np.repeat(x, size // block, axis=1) for x in (scales, zeros)]
    halves = [scales]
    if format == "q4_1":
        halves.append(-scales * zeros)
    elif format == "int4_g128":
        halves.append(zeros)
    parts = [half.astype(np.float16).reshape(-1, 1).view(np.uint8) for half in halves]
    integers = codes ^ np.uint8(128) if format == "q8_0" else nibbles(codes)
    parts.append(integers.reshape(len(parts[0]), -1))
    return np.concatenate(parts, axis=1).reshape(-1)


def nibbles(codes: np.ndarray) -> np.ndarray:
    """Codes of 4 bits as blocks have them: of each 32, the first half in the lower bits of 16
    bytes."""
    groups = codes.reshape(-1, 2, GROUP // 2)
    packed: np.ndarray = groups[:, 0] | groups[:, 1] << 4
    return packed
