"""The number formats that weights can be rounded to: what their codes stand for, how their scales
are stored, and how both are packed into blocks (the inverse of tiered.weights.dequantize).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import numpy as np

from cpu_kernels.formats import FORMATS, NF4, Format
from tiered.weights.dequantize import E2M1, IQ4_NL

NO_FACTOR = np.zeros((0, 0), np.float32)
FARTHEST_ZERO = 2048  # beyond it, float16 has no whole numbers any more, one by one

Pack = Callable[["Scales", np.ndarray], np.ndarray]


class Grid(NamedTuple):
    """What a format can say. A group of `group` values has a scale, and perhaps a minimum:
    a code stands for levels[code] * scale + minimum; `levels` ascend.

    With `has_zero`, what is stored of a minimum is -minimum / scale. With `integers`, the scales of
    a block are themselves integers in that range times one float16; with `powers`, they are powers
    of two. `pack` makes bytes of codes (uint8 [blocks, block_size]) and the scales as they are
    stored.
    """

    levels: tuple[float, ...]
    pack: Pack
    group: int = 32
    has_minimum: bool = False
    has_zero: bool = False
    integers: tuple[int, int] | None = None
    powers: bool = False


class Scales(NamedTuple):
    """Scales as a format stores them, and what they then are."""

    scale: np.ndarray  # float32 [rows, groups]
    minimum: np.ndarray  # float32 [rows, groups]; 0 where the format has none
    d: np.ndarray  # float16 [blocks, 1]; uint8, the exponents, where scales are powers of two
    d_min: np.ndarray  # float16 [blocks, 1]; the zero, where that is stored
    integers: np.ndarray  # int16 [blocks, groups of a block]: of the scales
    minimums: np.ndarray  # int16 [blocks, groups of a block]: of the minimums, with the other sign


def fit(format: str, values: np.ndarray, importance: np.ndarray) -> Scales:
    """The best scales for rows of values, as the format can store them.

    `values` is float32 [rows, columns] in whole blocks; `importance` float32 [columns], how much a
    column's squared error matters.
    """
    from cpu_kernels.rounding import fit_powers, fit_ranges, fit_scales

    grid, block = GRIDS[format], FORMATS[format].block_size
    rows, columns = values.shape
    groups = np.ascontiguousarray(values, np.float32).reshape(-1, grid.group)
    weights = np.ascontiguousarray(importance, np.float32).reshape(-1, grid.group)
    scale, minimum = np.zeros(len(groups), np.float32), np.zeros(len(groups), np.float32)
    if grid.powers:
        exponents = np.empty(len(groups), np.int32)
        fit_powers(groups, weights, *_levels(grid.levels), exponents, -127, 127)
        stored = (exponents + 127).astype(np.uint8).reshape(-1, 1)
        empty = np.zeros((len(groups), 1), np.float16)
        scale = _rows(np.ldexp(np.float32(1), exponents), rows)
        return Scales(scale, _rows(minimum, rows), stored, empty, empty, empty)
    if grid.has_minimum:
        below_zero = grid.integers is not None  # super-blocks store them without a sign
        fit_ranges(groups, weights, len(grid.levels), below_zero, scale, minimum)
    else:
        fit_scales(groups, weights, *_levels(grid.levels), scale)
    num_blocks = rows * columns // block
    by_block, minimum_by_block = scale.reshape(num_blocks, -1), minimum.reshape(num_blocks, -1)
    if grid.has_zero:
        d, zero = _with_zeros(by_block, minimum_by_block)
        below = -d.astype(np.float32) * zero
        return Scales(_rows(d, rows), _rows(below, rows), d, zero, by_block, minimum_by_block)
    if grid.integers is None:
        d, d_min = by_block.astype(np.float16), minimum_by_block.astype(np.float16)
        return Scales(_rows(d, rows), _rows(d_min, rows), d, d_min, by_block, minimum_by_block)
    d, integers = _in_integers(by_block, *grid.integers)
    d_min, minimums = _in_integers(-minimum_by_block, *grid.integers)
    whole, below = d.astype(np.float32) * integers, -d_min.astype(np.float32) * minimums
    return Scales(_rows(whole, rows), _rows(below, rows), d, d_min, integers, minimums)


@cache
def _levels(levels: tuple[float, ...]) -> tuple[np.ndarray, np.ndarray]:
    """float32 [number of codes], ascending, and the table of what is nearest to what."""
    from cpu_kernels.rounding import nearest_codes

    values = np.array(levels, np.float32)
    return values, nearest_codes(values)


def round_to(
    format: str,
    scales: Scales,
    values: np.ndarray,
    factor: np.ndarray = NO_FACTOR,
    losses: np.ndarray = NO_FACTOR,
) -> np.ndarray:
    """Codes uint8 [rows, columns] of `values`, which become what the codes stand for. With a
    `factor`, `losses` are filled: see cpu_kernels.rounding.round_columns."""
    from cpu_kernels.rounding import round_columns

    codes = np.empty(values.shape, np.uint8)
    table = _levels(GRIDS[format].levels)
    round_columns(values, scales.scale, scales.minimum, *table, factor, codes, losses)
    return codes


def pack(format: str, scales: Scales, codes: np.ndarray) -> np.ndarray:
    """uint8 [rows, row_bytes] of codes uint8 [rows, columns]."""
    blocks = codes.reshape(-1, FORMATS[format].block_size)
    return GRIDS[format].pack(scales, blocks).reshape(len(codes), -1)


def fitting_formats(columns: int) -> list[Format]:
    """The formats that rows of so many values can have, the smallest first."""
    found = [FORMATS[name] for name in GRIDS if columns % FORMATS[name].block_size == 0]
    return sorted(found, key=lambda format: format.bits)


def _rows(scales: np.ndarray, rows: int) -> np.ndarray:
    return np.ascontiguousarray(scales.reshape(rows, -1), np.float32)


def _with_zeros(scale: np.ndarray, minimum: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(scale, zero), float16 [blocks, 1]. Where the values of a block lie together so far from 0
    that no float16 is a zero to the half, code 0 is all of them."""
    d = scale.astype(np.float16).astype(np.float32)
    far = np.abs(minimum) > FARTHEST_ZERO * np.abs(d)
    d = np.where(far, -minimum, d).astype(np.float16)
    zero = np.divide(-minimum, d, out=np.zeros(d.shape, np.float32), where=d != 0, dtype=np.float32)
    return d, np.where(far, 1, zero).astype(np.float16)


def _in_integers(scale: np.ndarray, low: int, high: int) -> tuple[np.ndarray, np.ndarray]:
    """(d float16 [blocks, 1], int16 [blocks, groups]): scales as integers times d."""
    d = (np.abs(scale).max(axis=1, keepdims=True) / high).astype(np.float16)
    inverse = np.divide(1, d, out=np.zeros(d.shape, np.float32), where=d != 0, dtype=np.float32)
    return d, np.clip(np.rint(scale * inverse), low, high).astype(np.int16)


# --- bytes ---


def _bytes(values: np.ndarray) -> np.ndarray:
    """uint8 [blocks, bytes] of float16 [blocks, n]."""
    return np.ascontiguousarray(values).view(np.uint8).reshape(len(values), -1)


def _halves(codes: np.ndarray) -> np.ndarray:
    """Codes of four bits, the first half of each run in the lower bits."""
    half = codes.shape[-1] // 2
    packed: np.ndarray = codes[..., :half] | codes[..., half:] << 4
    return packed


def _groups(codes: np.ndarray) -> np.ndarray:
    """The same of each group of 32 in a block."""
    return _halves(codes.reshape(len(codes), -1, 32)).reshape(len(codes), -1)


def _fifth_bits(codes: np.ndarray) -> np.ndarray:
    return np.packbits(codes >> 4, axis=1, bitorder="little")


def _high_bits(codes: np.ndarray) -> np.ndarray:
    """Bits [blocks, 8, 32]: the one of value i of group j is bit j of byte i."""
    bit = np.arange(8, dtype=np.uint8)[:, None]
    result: np.ndarray = np.bitwise_or.reduce(codes << bit, axis=1)
    return result


def _quarters(codes: np.ndarray) -> np.ndarray:
    """Codes of two bits: four groups of 32 share the bytes of a run."""
    shifts = np.array([0, 2, 4, 6], np.uint8)[:, None]
    runs: np.ndarray = np.bitwise_or.reduce(codes.reshape(-1, 2, 4, 32) << shifts, axis=2)
    return runs.reshape(-1, 64)


def _pack_q8_0(scales: Scales, codes: np.ndarray) -> np.ndarray:
    return np.concatenate([_bytes(scales.d), codes - np.uint8(127)], axis=1)


def _pack_4_bits(scales: Scales, codes: np.ndarray) -> np.ndarray:
    return np.concatenate([_bytes(scales.d), _groups(codes)], axis=1)


def _pack_q4_1(scales: Scales, codes: np.ndarray) -> np.ndarray:
    return np.concatenate([_bytes(scales.d), _bytes(scales.d_min), _groups(codes)], axis=1)


def _pack_q5_0(scales: Scales, codes: np.ndarray) -> np.ndarray:
    return np.concatenate([_bytes(scales.d), _fifth_bits(codes), _halves(codes & 15)], axis=1)


def _pack_q5_1(scales: Scales, codes: np.ndarray) -> np.ndarray:
    parts = [_bytes(scales.d), _bytes(scales.d_min), _fifth_bits(codes), _halves(codes & 15)]
    return np.concatenate(parts, axis=1)


def _pack_mxfp4(scales: Scales, codes: np.ndarray) -> np.ndarray:
    return np.concatenate([scales.d, _halves(_E2M1_CODES[codes])], axis=1)


def _pack_q2_k(scales: Scales, codes: np.ndarray) -> np.ndarray:
    both = (scales.integers | scales.minimums << 4).astype(np.uint8)
    return np.concatenate([both, _quarters(codes), _bytes(scales.d), _bytes(scales.d_min)], axis=1)


def _pack_q3_k(scales: Scales, codes: np.ndarray) -> np.ndarray:
    high = _high_bits(codes.reshape(-1, 8, 32) >> 2)
    scale = (scales.integers + 32).astype(np.uint8)
    upper = (scale >> 4).reshape(-1, 4, 4) << np.array([0, 2, 4, 6], np.uint8)[:, None]
    low = [_halves(scale & 15), np.bitwise_or.reduce(upper, axis=1)]
    return np.concatenate([high, _quarters(codes & 3), *low, _bytes(scales.d)], axis=1)


def _six_bits(scales: Scales) -> np.ndarray:
    """The 12 bytes of eight scales and eight minimums of six bits."""
    scale, minimum = scales.integers.astype(np.uint8), scales.minimums.astype(np.uint8)
    (a, b), (c, d) = np.split(scale, 2, axis=1), np.split(minimum, 2, axis=1)
    return np.concatenate([a | b >> 4 << 6, c | d >> 4 << 6, (b & 15) | (d & 15) << 4], axis=1)


def _pack_q4_k(scales: Scales, codes: np.ndarray) -> np.ndarray:
    low = _halves(codes.reshape(-1, 4, 64)).reshape(-1, 128)
    return np.concatenate([_bytes(scales.d), _bytes(scales.d_min), _six_bits(scales), low], axis=1)


def _pack_q5_k(scales: Scales, codes: np.ndarray) -> np.ndarray:
    high = _high_bits(codes.reshape(-1, 8, 32) >> 4)
    low = _halves((codes & 15).reshape(-1, 4, 64)).reshape(-1, 128)
    parts = [_bytes(scales.d), _bytes(scales.d_min), _six_bits(scales), high, low]
    return np.concatenate(parts, axis=1)


def _pack_q6_k(scales: Scales, codes: np.ndarray) -> np.ndarray:
    low = _halves((codes & 15).reshape(-1, 2, 128)).reshape(-1, 128)
    shifts = np.array([0, 2, 4, 6], np.uint8)[:, None]
    high = np.bitwise_or.reduce((codes.reshape(-1, 2, 4, 32) >> 4) << shifts, axis=2)
    scale = scales.integers.astype(np.int8).view(np.uint8)
    return np.concatenate([low, high.reshape(-1, 64), scale, _bytes(scales.d)], axis=1)


def _integers(low: int, high: int) -> tuple[float, ...]:
    return tuple(float(level) for level in range(low, high + 1))


_E2M1 = np.unique(E2M1)  # two codes are zero
_E2M1_CODES = np.array([E2M1.tolist().index(level) for level in _E2M1], np.uint8)

GRIDS: dict[str, Grid] = {
    "q2_k": Grid(_integers(0, 3), _pack_q2_k, 16, has_minimum=True, integers=(0, 15)),
    "q3_k": Grid(_integers(-4, 3), _pack_q3_k, 16, integers=(-32, 31)),
    "mxfp4": Grid(tuple(_E2M1.tolist()), _pack_mxfp4, powers=True),
    "int4_g128": Grid(_integers(0, 15), _pack_q4_1, 128, has_minimum=True, has_zero=True),
    "nf4": Grid(tuple(map(float, NF4)), _pack_4_bits, 64),
    "q4_0": Grid(_integers(-8, 7), _pack_4_bits),
    "iq4_nl": Grid(tuple(IQ4_NL.tolist()), _pack_4_bits),
    "q4_k": Grid(_integers(0, 15), _pack_q4_k, has_minimum=True, integers=(0, 63)),
    "q4_1": Grid(_integers(0, 15), _pack_q4_1, has_minimum=True),
    "q5_0": Grid(_integers(-16, 15), _pack_q5_0),
    "q5_k": Grid(_integers(0, 31), _pack_q5_k, has_minimum=True, integers=(0, 63)),
    "q5_1": Grid(_integers(0, 31), _pack_q5_1, has_minimum=True),
    "q6_k": Grid(_integers(-32, 31), _pack_q6_k, 16, integers=(-128, 127)),
    "q8_0": Grid(_integers(-127, 127), _pack_q8_0),
}
