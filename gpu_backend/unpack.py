"""Quantized matrices taken apart, in torch: integers, scales and offsets of every group."""

from __future__ import annotations

from typing import NamedTuple

import torch

from cpu_kernels.formats import FORMATS
from gpu_backend.arrays import Quantized
from gpu_backend.formats import GROUP, check_format, parts_of, plane_offsets


class Unpacked(NamedTuple):
    """A weight is scale * integer + offset. q6_k has two scales and offsets: of half groups."""

    integers: torch.Tensor  # float32 [N, G, 32], whole numbers
    scales: torch.Tensor  # float32 [1 or 2, N, G]
    offsets: torch.Tensor  # float32 [0, 1 or 2, N, G]
    kinds: tuple[int, ...]  # the plane of activation factors that each offset is multiplied with


def unpack(matrix: Quantized) -> Unpacked:
    """`matrix.data` may be longer than the matrix."""
    check_format(matrix.format)
    shape, format = matrix.shape, FORMATS[matrix.format]
    num_blocks = shape[0] * shape[1] // format.block_size
    parts = []
    places = zip(parts_of(format.name), plane_offsets(format.name, num_blocks), strict=True)
    for part, at in places:
        parts.append(matrix.data[at : at + num_blocks * part.nbytes].reshape(num_blocks, -1))
    if len(parts) == 1:
        (block,) = parts
        unpacked = _unpack_k(block, 16 if format.name == "q4_k" else 48)
    elif format.name == "q6_k":
        unpacked = _unpack_q6_k(*parts)
    else:
        unpacked = _unpack_simple(format.name, *parts)
    by_row = [t.reshape(-1, shape[0], shape[1] // GROUP) for t in unpacked[1:3]]
    return Unpacked(
        unpacked[0].float().reshape(shape[0], -1, GROUP), by_row[0], by_row[1], unpacked[3]
    )


def dequantize(matrix: Quantized) -> torch.Tensor:
    """The weights as float32 [N, K]."""
    integers, scales, offsets, _ = unpack(matrix)
    halves = torch.repeat_interleave(scales, GROUP // len(scales), 0)  # [32, N, G]
    values = integers * halves.permute(1, 2, 0)
    if len(offsets):
        added = torch.repeat_interleave(offsets, GROUP // len(offsets), 0)
        values = values + added.permute(1, 2, 0)
    return values.reshape(matrix.shape)


def _half(data: torch.Tensor) -> torch.Tensor:
    """uint8 [n, 2 * m] as float32 [n, m]."""
    return data.contiguous().view(torch.float16).float()


def _nibbles(data: torch.Tensor) -> torch.Tensor:
    """uint8 [n, m] to [n, 2 * m]: low halves first."""
    return torch.cat([data & 15, data >> 4], -1)


def _unpack_simple(format: str, data: torch.Tensor, scale_bytes: torch.Tensor) -> Unpacked:
    scales = _half(scale_bytes)  # [num_blocks, 1 or 2]
    scale = scales[:, :1].T
    if format == "q8_0":
        return Unpacked(data.view(torch.int8), scale, scale[:0], ())
    offset = scale * -8.0 if format == "q4_0" else scales[:, 1:].T
    return Unpacked(_nibbles(data), scale, offset, (1,))


def _unpack_k(block: torch.Tensor, low_at: int) -> Unpacked:
    """q4_k and q5_k: two factors, eight scales and minima of 6 bits, (high bits,) low bits."""
    factors = _half(block[:, :4])  # [n, 2]
    a, b, c = block[:, 4:8], block[:, 8:12], block[:, 12:16]
    scales = torch.cat([a & 63, (c & 15) | ((a >> 2) & 48)], -1).float()  # [n, 8]
    minima = torch.cat([b & 63, (c >> 4) | ((b >> 2) & 48)], -1).float()
    low = block[:, low_at:].reshape(-1, 4, 1, GROUP)
    integers = torch.cat([low & 15, low >> 4], 2).reshape(-1, 8, GROUP)
    if low_at == 48:
        shift = torch.arange(8, dtype=torch.uint8, device=block.device)[:, None]
        integers = integers | (((block[:, None, 16:48] >> shift) & 1) << 4)
    scale, minimum = scales * factors[:, :1], minima * factors[:, 1:]
    return Unpacked(integers, scale[None], minimum[None] * -1.0, (1,))


def _unpack_q6_k(
    low: torch.Tensor, high: torch.Tensor, scale_bytes: torch.Tensor, factor: torch.Tensor
) -> Unpacked:
    low = low.reshape(-1, 2, 2, GROUP)
    low = torch.cat([low & 15, low >> 4], 2)  # [n, 2, 4, 32]
    shift = torch.arange(0, 8, 2, dtype=torch.uint8, device=low.device)[:, None]
    high = (high.reshape(-1, 2, 1, GROUP) >> shift) & 3
    scales = scale_bytes.contiguous().view(torch.int8).float() * _half(factor)  # [n, 16]
    halves = scales.reshape(-1, 8, 2).permute(2, 0, 1)  # [2, n, 8]
    return Unpacked(low | (high << 4), halves, halves * -32.0, (2, 3))
