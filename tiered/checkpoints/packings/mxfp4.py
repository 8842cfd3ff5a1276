"""MXFP4 as gpt-oss publishes it: X_blocks, uint8 [..., rows, groups, 16], and X_scales, uint8
[..., rows, groups]. Byte j of a group has values 2j (low half) and 2j + 1; a scale is an exponent,
biased by 127. OCP Microscaling Formats, 1.0.
"""

from __future__ import annotations

import numpy as np

from tiered.checkpoints.checkpoint import CheckpointError, Packed, Tensor
from tiered.checkpoints.facts import Facts

BLOCKS, SCALES = "_blocks", "_scales"
GROUP_BYTES = 16


def join(stored: list[Tensor], settings: Facts) -> list[Tensor]:
    scales = {t.name.removesuffix(SCALES): t for t in stored if t.name.endswith(SCALES)}
    return [
        _weight(tensor, scales.get(tensor.name.removesuffix(BLOCKS)))
        if tensor.name.endswith(BLOCKS)
        else tensor
        for tensor in stored
        if not tensor.name.endswith(SCALES)
    ]


def _weight(blocks: Tensor, scales: Tensor | None) -> Tensor:
    if (
        scales is None
        or len(blocks.shape) < 3
        or (blocks.format, scales.format) != ("U8", "U8")
        or blocks.shape != (*scales.shape, GROUP_BYTES)
    ):
        raise CheckpointError(
            f"{blocks.file}: tensor {blocks.name!r} must be U8 [..., rows, groups, 16] and have "
            "scales, U8 [..., rows, groups], beside it"
        )
    *outer, groups = scales.shape
    return blocks._replace(
        name=blocks.name.removesuffix(BLOCKS),
        format="mxfp4",
        shape=(*outer, 2 * GROUP_BYTES * groups),
        nbytes=blocks.nbytes + scales.nbytes,
        packed=Packed((blocks, scales), unpack),
    )


def unpack(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """GGUF's blocks of the same values: the exponent, then 16 bytes whose low halves are the first
    16 values."""
    halves = blocks.reshape(-1, 8, 2, 1) >> np.array([0, 4], np.uint8) & 15
    values = halves.reshape(-1, 2, GROUP_BYTES)  # of each group, the first 16 and the last 16
    out = np.empty((len(values), 1 + GROUP_BYTES), np.uint8)
    out[:, 0] = scales
    np.left_shift(values[:, 1], 4, out=out[:, 1:])
    out[:, 1:] |= values[:, 0]
    return out.reshape(-1)
