"""Float weights of a checkpoint to blocks of integers: 4 bits for experts, q8_0 for the rest."""

from __future__ import annotations

import numpy as np

from cpu_kernels.formats import FORMATS
from tiered.checkpoints.checkpoint import CheckpointError, Tensor

GROUP_SIZE = 32  # values of q8_0 that share one float16 scale
_MAX_WEIGHT = 4e5  # beyond it, scales would be no float16


def quantize_rows(data: np.ndarray, tensor: Tensor, format: str) -> np.ndarray:
    """uint8 [num_rows, row_bytes] of `format`, from bytes of whole rows of a float tensor.

    Raises CheckpointError for weights that no sound model has.
    """
    from cpu_kernels.quantize import quantize_blocks

    blocks, largest = quantize_blocks(data, tensor.format, format)
    if not largest < _MAX_WEIGHT:  # false for NaN, too
        raise CheckpointError(
            f"{tensor.file}: tensor {tensor.name!r} is damaged: it holds NaN or huge values"
        )
    rows: np.ndarray = blocks.reshape(-1, FORMATS[format].row_bytes(tensor.shape[-1]))
    return rows
