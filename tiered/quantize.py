"""Float weights to blocks of integers, in NumPy: as ggml's reference does it (ggml-quants.c).

Group-32 blocks with one float16 scale: q4_0 for experts, q8_0 for what every token uses.
"""

from __future__ import annotations

import numpy as np

from tiered.checkpoint import CheckpointError, Tensor
from tiered.dequantize import dequantize

GROUP_SIZE = 32
_MAX_WEIGHT = 4e5  # beyond it, scales would be no float16


def quantize_rows(data: np.ndarray, tensor: Tensor, format: str) -> np.ndarray:
    """uint8 [num_rows, row_bytes] of `format`, from bytes of whole rows of a float tensor."""
    values = dequantize(data, tensor.format, (-1, tensor.shape[-1]))
    if not np.abs(values).max() < _MAX_WEIGHT:  # false for NaN, too
        raise CheckpointError(
            f"{tensor.file}: tensor {tensor.name!r} is damaged: it holds NaN or huge values"
        )
    blocks = quantize_q4_0(values) if format == "q4_0" else quantize_q8_0(values)
    return blocks.reshape(len(values), -1)


def quantize_q4_0(values: np.ndarray) -> np.ndarray:
    """uint8 [num_blocks, 18] from float32 values, a multiple of 32: scale * (code - 8)."""
    groups = values.reshape(-1, GROUP_SIZE)
    peak = np.abs(groups).argmax(axis=1, keepdims=True)
    scale = np.take_along_axis(groups, peak, axis=1) / np.float32(-8)
    codes = np.minimum(groups * _inverse(scale) + np.float32(8.5), 15).astype(np.uint8)
    blocks = np.empty((len(groups), 18), np.uint8)
    blocks[:, :2] = scale.astype(np.float16).view(np.uint8)
    blocks[:, 2:] = codes[:, :16] | (codes[:, 16:] << 4)
    return blocks


def quantize_q8_0(values: np.ndarray) -> np.ndarray:
    """uint8 [num_blocks, 34] from float32 values, a multiple of 32: scale * code."""
    groups = values.reshape(-1, GROUP_SIZE)
    scale = np.abs(groups).max(axis=1, keepdims=True) / np.float32(127)
    scaled = groups * _inverse(scale)
    codes = np.trunc(scaled + np.copysign(np.float32(0.5), scaled)).astype(np.int8)
    blocks = np.empty((len(groups), 34), np.uint8)
    blocks[:, :2] = scale.astype(np.float16).view(np.uint8)
    blocks[:, 2:] = codes.view(np.uint8)
    return blocks


def _inverse(scale: np.ndarray) -> np.ndarray:
    """1 / scale, and 0 for groups of zeros (as float16, such a small scale is 0)."""
    inverse: np.ndarray = np.divide(1, scale, out=np.zeros_like(scale), where=abs(scale) > 1e-30)
    return inverse
