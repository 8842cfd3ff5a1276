"""GPTQ (and GPTQModel): qweight, int32 [in / n, out] with n weights of a column in a word; qzeros,
int32 [groups, out / n]; scales [groups, out]; g_idx, int32 [in]: the group of each input feature.

A weight is scale * (integer - zero); files of the first version have the zero less 1.
https://github.com/ModelCloud/GPTQModel (nn_modules/qlinear), AutoGPTQ before it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np

from tiered.checkpoints.checkpoint import CheckpointError, Tensor
from tiered.checkpoints.facts import Facts
from tiered.checkpoints.quantized import (
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

PARTS = "qweight", "qzeros", "scales", "g_idx"


def join(stored: list[Tensor], settings: Facts) -> list[Tensor]:
    bits = settings.integer("bits")
    if bits not in (4, 8):
        raise settings.error("bits", bits, "4 or 8 (what the kernels compute)")
    form = Form(
        bits,
        settings.flag("sym", default=True),
        settings.flag("desc_act", default=False),
        zero_offset=int(settings.text("checkpoint_format", default="gptq") == "gptq"),
    )
    return join_parts(stored, PARTS, form.weight)


@dataclass(frozen=True)
class Form:
    """What config.json says of all weights."""

    bits: int
    symmetric: bool
    any_order: bool  # neighbouring input features may be of different groups
    zero_offset: int

    @property
    def middle(self) -> int:
        return 1 << (self.bits - 1)

    def weight(self, name: str, parts: Parts) -> Tensor:
        qweight, qzeros, scales = take(parts, "qweight", "qweight", "qzeros", "scales")
        order = parts.get("g_idx") if self.any_order else None
        if len(qweight.shape) != 2 or len(scales.shape) != 2 or not scales.shape[0]:
            check(qweight, ("I32",), [(0, 0)])
        in_word = 32 // self.bits
        columns, rows, groups = qweight.shape[0] * in_word, qweight.shape[1], scales.shape[0]
        check(qweight, ("I32",), [(columns // in_word, rows)])
        check(qzeros, ("I32",), [(groups, rows // in_word)])
        check(scales, ("f16", "bf16", "f32"), [(groups, rows)])
        check_groups(name, scales, groups, columns)
        pieces = [qweight, qzeros, scales]
        if order is not None:
            check(order, ("I32",), [(columns,)])
            pieces.append(order)

        format = block_format(self.bits, self.symmetric, self.any_order, columns // groups)
        unpack = partial(self._unpack, name, format, scales, columns)
        return packed(name, format, (rows, columns), tuple(pieces), unpack)

    def _unpack(
        self,
        name: str,
        format: str,
        scales: Tensor,
        columns: int,
        qweight: np.ndarray,
        qzeros: np.ndarray,
        scale_data: np.ndarray,
        order: np.ndarray | None = None,
    ) -> np.ndarray:
        rows = scales.shape[1]
        # Words of a column become words of a row: [rows, columns / n].
        across = np.ascontiguousarray(qweight.view(np.uint32).reshape(-1, rows).T).view(np.uint8)
        codes = words(across, self.bits, columns * self.bits // 32)
        zeros = words(qzeros, self.bits, rows * self.bits // 32).T + np.uint8(self.zero_offset)
        if self.bits == 4:
            zeros &= 15
        values = floats(scale_data, scales.format, scales.shape).T
        if format in ("q4_0", "q8_0") and (zeros != self.middle).any():
            raise CheckpointError(
                f"{scales.file}: config.json says that weights are symmetric, but the zeros of "
                f"{name!r} are not {self.middle}"
            )
        if order is not None:
            values, zeros = by_column(name, scales, order, values, zeros)
        return blocks(codes, format, values, zeros)
