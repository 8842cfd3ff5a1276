"""AWQ: qweight, int32 [in, out / 8]; qzeros, int32 [groups, out / 8]; scales [groups, out].

The eight weights of a word are those of output features 0, 2, 4, 6, 1, 3, 5, 7, lowest bits first;
a weight is scale * (integer - zero).
https://github.com/casper-hansen/AutoAWQ (awq/modules/linear/gemm.py).
"""

from __future__ import annotations

from functools import partial

import numpy as np

from tiered.checkpoints.checkpoint import Tensor
from tiered.checkpoints.facts import Facts
from tiered.checkpoints.quantized import (
    Parts,
    block_format,
    blocks,
    check,
    check_groups,
    floats,
    join_parts,
    packed,
    take,
    words,
)

PARTS = "qweight", "qzeros", "scales"
ORDER = 0, 2, 4, 6, 1, 3, 5, 7
PLACES = [ORDER.index(feature) for feature in range(8)]


def join(stored: list[Tensor], settings: Facts) -> list[Tensor]:
    if (bits := settings.integer("bits", "w_bit")) != 4:
        raise settings.error("bits", bits, "4")
    if (version := settings.text("version", default="gemm").lower()) != "gemm":
        raise settings.error("version", version, "'gemm'")
    return join_parts(stored, PARTS, _weight)


def _weight(name: str, parts: Parts) -> Tensor:
    qweight, qzeros, scales = take(parts, "qweight", *PARTS)
    if len(scales.shape) != 2 or len(qweight.shape) != 2 or not scales.shape[0]:
        check(scales, ("f16", "bf16"), [(0, 0)])
    columns, (groups, rows) = qweight.shape[0], scales.shape
    check(qweight, ("I32",), [(columns, rows // 8)])
    check(qzeros, ("I32",), [(groups, rows // 8)])
    check(scales, ("f16", "bf16", "f32"), [(groups, rows)])
    check_groups(name, scales, groups, columns)
    format = block_format(4, False, False, columns // groups)
    unpack = partial(_unpack, format, scales)
    return packed(name, format, (rows, columns), (qweight, qzeros, scales), unpack)


def _unpack(
    format: str, scales: Tensor, qweight: np.ndarray, qzeros: np.ndarray, scale_data: np.ndarray
) -> np.ndarray:
    codes, zeros = [_in_order(data, scales.shape[1]) for data in (qweight, qzeros)]
    values = floats(scale_data, scales.format, scales.shape).T
    return blocks(np.ascontiguousarray(codes), format, values, zeros)


def _in_order(data: np.ndarray, rows: int) -> np.ndarray:
    """uint8 [rows, columns]."""
    codes = words(data, 4, rows // 8).reshape(-1, 8)[:, PLACES]
    ordered: np.ndarray = codes.reshape(-1, rows).T
    return ordered
