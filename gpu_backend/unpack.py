"""Quantized matrices taken apart, in torch: integers, scales and offsets of every group."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from cpu_kernels.formats import FORMATS
from gpu_backend.arrays import Quantized
from gpu_backend.formats import GROUP, LAYOUTS, Layout, check_format, plane_offsets

WHOLE, FIRST, SECOND = 1, 2, 3  # planes of the activations' factors: sums of groups and halves
Scales = tuple[list[torch.Tensor], list[torch.Tensor]]  # of groups, or of first and second halves


class Unpacked(NamedTuple):
    """A weight is scale * integer + offset * the format's offset_factor."""

    integers: torch.Tensor  # float32 [N, G, 32], whole numbers
    scales: torch.Tensor  # float32 [1 or 2, N, G]
    offsets: torch.Tensor  # float32 [0, 1 or 2, N, G]
    kinds: tuple[int, ...]  # the plane of activation factors that each offset is multiplied with


def unpack(matrix: Quantized) -> Unpacked:
    """`matrix.data` may be longer than the matrix."""
    check_format(matrix.format)
    layout, by_row = LAYOUTS[matrix.format], (matrix.shape[0], matrix.shape[1] // GROUP)
    num_blocks = matrix.shape[0] * matrix.shape[1] // FORMATS[matrix.format].block_size
    planes = [
        matrix.data[at : at + num_blocks * part.nbytes].reshape(num_blocks, -1)
        for part, at in zip(layout.parts, plane_offsets(matrix.format, num_blocks), strict=True)
    ]
    integers = _integers(layout, planes).float().reshape(*by_row, GROUP)
    first = len(planes) - len(layout.scale_parts)
    scales, offsets = _SCALES[layout.scales](*planes[first:])
    offsets = offsets if layout.offset_factor else []
    kinds = ((), (WHOLE,), (FIRST, SECOND))[len(offsets)]
    return Unpacked(integers, _stacked(scales, by_row), _stacked(offsets, by_row), kinds)


def dequantize(matrix: Quantized) -> torch.Tensor:
    """The weights as float32 [N, K]."""
    integers, scales, offsets, _ = unpack(matrix)
    halves = torch.repeat_interleave(scales, GROUP // len(scales), 0)  # [32, N, G]
    values = integers * halves.permute(1, 2, 0)
    if len(offsets):
        offsets = offsets * LAYOUTS[matrix.format].offset_factor
        added = torch.repeat_interleave(offsets, GROUP // len(offsets), 0)
        values = values + added.permute(1, 2, 0)
    return values.reshape(matrix.shape)


def _stacked(values: Sequence[torch.Tensor], by_row: tuple[int, int]) -> torch.Tensor:
    """By row and group, of what blocks have once, or once for each group."""
    if not values:
        return torch.empty(0, *by_row)
    groups = by_row[0] * by_row[1]
    each = [v.reshape(-1).repeat_interleave(groups // v.numel()) for v in values]
    return torch.stack(each).reshape(-1, *by_row)


def _integers(layout: Layout, planes: Sequence[torch.Tensor]) -> torch.Tensor:
    """Whole numbers of some integer type, groups in order."""
    low = planes[0]
    if layout.is_split:
        low = low.reshape(-1, GROUP // 2)
        low = torch.cat([low & 15, low >> 4], -1)
    elif layout.low_bits < 8:
        runs = low.reshape(len(low), -1, 1, layout.runs, GROUP)
        low = _shifted(runs, layout.low_bits, layout.sharing // layout.runs)
    if layout.table:
        low = torch.tensor(layout.table, device=low.device)[low.int()]
    if layout.single_bits:
        bits = _shifted(planes[1].reshape(-1, 4, 1, 1, 1), 1, 8)
        low = low | (bits.reshape(-1, GROUP) << layout.low_bits)
    elif layout.high_bits:
        runs = planes[1].reshape(len(low), -1, 1, 1, GROUP)
        high = _shifted(runs, layout.high_bits, 8 // layout.high_bits)
        low = low.reshape(high.shape[0], -1) | (high.reshape(high.shape[0], -1) << layout.low_bits)
    return low if layout.low_bits < 8 else low.view(torch.int8)


def _shifted(data: torch.Tensor, num_bits: int, count: int) -> torch.Tensor:
    """uint8 [..., 1, a, b] to [..., count, a, b]: each time the next higher bits."""
    shift = torch.arange(0, count * num_bits, num_bits, dtype=torch.uint8, device=data.device)
    return (data >> shift[:, None, None]) & ((1 << num_bits) - 1)


def _floats(data: torch.Tensor) -> torch.Tensor:
    """uint8 [n, 2 * m] as float32 [n, m]."""
    return data.contiguous().view(torch.float16).float()


def _half(data: torch.Tensor) -> Scales:
    scale = _floats(data)
    return [scale], [scale]


def _minimum(data: torch.Tensor) -> Scales:
    both = _floats(data)
    return [both[:, 0]], [both[:, 1]]


def _zero(data: torch.Tensor) -> Scales:
    both = _floats(data)
    return [both[:, 0]], [both[:, 0] * both[:, 1]]


def _power(data: torch.Tensor) -> Scales:
    """Half of 2 ** (byte - 127)."""
    exponent = data.int()
    bits = torch.where(exponent < 2, (exponent + 1) << 21, (exponent - 1) << 23)
    scale = bits.view(torch.float32)
    return [scale], [scale]


def _iq4_xs(data: torch.Tensor) -> Scales:
    """A factor, the upper 2 bits of eight scales in 2 bytes, the lower 4 in 4 bytes."""
    low = _shifted(data[:, 4:8, None, None, None], 4, 2).reshape(-1, 8)
    high = _shifted(data[:, 2:4, None, None, None], 2, 4).reshape(-1, 8)
    return [((low | (high << 4)).float() - 32) * _floats(data[:, :2])], []


def _q2_k(data: torch.Tensor, factors: torch.Tensor) -> Scales:
    both = _floats(factors)
    scales, minima = (data & 15).float() * both[:, :1], (data >> 4).float() * both[:, 1:]
    return [scales[:, 0::2], scales[:, 1::2]], [minima[:, 0::2], minima[:, 1::2]]


def _q3_k(data: torch.Tensor, factor: torch.Tensor) -> Scales:
    """The lower 4 bits of sixteen scales in 8 bytes, the upper 2 in 4 bytes."""
    low = torch.cat([data[:, :8] & 15, data[:, :8] >> 4], -1)
    high = _shifted(data[:, None, None, 8:], 2, 4).reshape(-1, 16)
    scales = ((low | (high << 4)).float() - 32) * _floats(factor)
    halves = [scales[:, 0::2], scales[:, 1::2]]
    return halves, halves


def _six_bits(data: torch.Tensor) -> Scales:
    """Two factors, then eight scales and eight minima of 6 bits in 12 bytes."""
    factors, a, b, c = _floats(data[:, :4]), data[:, 4:8], data[:, 8:12], data[:, 12:16]
    scales = torch.cat([a & 63, (c & 15) | ((a >> 2) & 48)], -1).float()  # [n, 8]
    minima = torch.cat([b & 63, (c >> 4) | ((b >> 2) & 48)], -1).float()
    return [scales * factors[:, :1]], [minima * factors[:, 1:]]


def _q6_k(data: torch.Tensor, factor: torch.Tensor) -> Scales:
    scales = data.contiguous().view(torch.int8).float() * _floats(factor)  # [n, 16]
    halves = [scales[:, 0::2], scales[:, 1::2]]
    return halves, halves


_SCALES: dict[str, Callable[..., Scales]] = {
    "half": _half,
    "minimum": _minimum,
    "zero": _zero,
    "power": _power,
    "iq4_xs": _iq4_xs,
    "q2_k": _q2_k,
    "q3_k": _q3_k,
    "six_bits": _six_bits,
    "q6_k": _q6_k,
}
