"""Parts of larger tensors that the file does not have as rows one after the other."""

from __future__ import annotations

from functools import partial

import numpy as np

from cpu_kernels.formats import FORMATS
from tiered.checkpoints.checkpoint import Packed, Tensor

_VALUES = {"f32": np.uint32, "f16": np.uint16, "bf16": np.uint16}  # of which only bits are moved


def matrix_of(tensor: Tensor, index: int) -> Tensor:
    """Matrix `index` of a tensor [count, rows, columns]."""
    shape = tensor.shape[1:]
    if tensor.packed is None:
        nbytes = tensor.nbytes // tensor.shape[0]
        return tensor._replace(shape=shape, offset=tensor.offset + index * nbytes, nbytes=nbytes)
    parts = tuple(matrix_of(part, index) for part in tensor.packed.parts)
    return tensor._replace(
        shape=shape,
        offset=parts[0].offset,
        nbytes=tensor.nbytes // tensor.shape[0],
        packed=tensor.packed._replace(parts=parts),
    )


def transposed(tensor: Tensor) -> Tensor:
    """The transpose of a matrix of floats."""
    shape = tensor.shape[::-1]
    return _repacked(tensor, shape, partial(_transpose, shape=tensor.shape, format=tensor.format))


def take_rows(tensor: Tensor, start: int, count: int, step: int) -> Tensor:
    """`count` rows of a matrix, from row `start` on, `step` apart."""
    row_bytes = int(FORMATS[tensor.format].row_bytes(tensor.shape[-1]))
    shape = count, tensor.shape[-1]
    if step == 1 and tensor.packed is None:
        offset = tensor.offset + start * row_bytes
        return tensor._replace(shape=shape, offset=offset, nbytes=count * row_bytes)
    select = partial(_take_rows, row_bytes=row_bytes, start=start, count=count, step=step)
    return _repacked(tensor, shape, select)


def _repacked(tensor: Tensor, shape: tuple[int, ...], change: partial[np.ndarray]) -> Tensor:
    """`tensor` with one more step to the rows that are wanted."""
    nbytes = shape[0] * int(FORMATS[tensor.format].row_bytes(shape[-1]))
    plain = tensor.packed is None
    parts = (tensor,) if tensor.packed is None else tensor.packed.parts
    before = None if tensor.packed is None else tensor.packed.unpack

    def unpack(*pieces: np.ndarray) -> np.ndarray:
        return change(pieces[0] if plain or before is None else before(*pieces))

    return tensor._replace(shape=shape, nbytes=nbytes, packed=Packed(parts, unpack))


def _transpose(data: np.ndarray, shape: tuple[int, ...], format: str) -> np.ndarray:
    values = data.view(_VALUES[format]).reshape(shape)
    return np.ascontiguousarray(values.T).reshape(-1).view(np.uint8)


def _take_rows(data: np.ndarray, row_bytes: int, start: int, count: int, step: int) -> np.ndarray:
    rows = data.reshape(-1, row_bytes)[start : start + count * step : step]
    return np.ascontiguousarray(rows).reshape(-1)
