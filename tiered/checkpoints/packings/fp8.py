"""FP8 with a scale for each square of weights, as DeepSeek-V3 and Qwen publish it: weight, F8_E4M3
[..., rows, columns], and weight_scale_inv [..., rows / 128, columns / 128] or a single number. Its
values are multiplied with their scale, and kept as BF16.
"""

from __future__ import annotations

from functools import partial

import numpy as np

from tiered.checkpoints.checkpoint import CheckpointError, Tensor
from tiered.checkpoints.facts import Facts
from tiered.checkpoints.quantized import Parts, check, floats, join_parts, packed, take

PARTS = "weight_scale_inv", "weight"


def join(stored: list[Tensor], settings: Facts) -> list[Tensor]:
    size = settings.integers("weight_block_size") or (1, 1)
    if len(size) != 2 or min(size) < 1:
        raise settings.error("weight_block_size", list(size), "two whole numbers")
    stored = [  # of weights with one scale for all
        tensor._replace(name=tensor.name + "_inv")
        if tensor.name.endswith(".weight_scale")
        else tensor
        for tensor in stored
        if not tensor.name.endswith((".input_scale", ".activation_scale"))
    ]
    return join_parts(stored, PARTS, partial(_weight, size=size))


def _weight(name: str, parts: Parts, size: tuple[int, int]) -> Tensor:
    weight, scales = take(parts, "weight_scale_inv", "weight", "weight_scale_inv")
    return scaled(name, weight, scales, size)


def scaled(name: str, weight: Tensor, scales: Tensor, size: tuple[int, int]) -> Tensor:
    """A weight whose squares of size [height, width], whose rows, or which as a whole has a
    scale."""
    if len(weight.shape) < 2 or weight.format != "F8_E4M3":
        raise CheckpointError(
            f"{weight.file}: tensor {weight.name!r} must be F8_E4M3 [..., rows, columns]"
        )
    *outer, rows, columns = weight.shape
    squares = (*outer, -(-rows // size[0]), -(-columns // size[1]))
    check(
        scales,
        ("f32", "bf16", "f16"),
        [squares, (*outer, rows, 1), (*outer, 1, 1), (*outer, 1), tuple(outer), (1,)],
    )

    def unpack(data: np.ndarray, scale_data: np.ndarray) -> np.ndarray:
        values = E4M3[data].reshape(-1, rows, columns)
        scale = floats(scale_data, scales.format, (-1,))
        if scales.shape == squares:
            scale = scale.reshape(-1, *squares[-2:])
            scale = np.repeat(np.repeat(scale, size[0], axis=1), size[1], axis=2)
            values *= scale[:, :rows, :columns]
        else:
            values *= scale.reshape(len(values), -1, 1)
        return _to_bf16(values)

    return packed(name, "bf16", weight.shape, (weight, scales), unpack)


def _e4m3() -> np.ndarray:
    """The values of all bytes: sign, 4 bits of exponent with bias 7, 3 bits; no infinity."""
    byte = np.arange(256)
    exponent, fraction = byte >> 3 & 15, byte & 7
    value = np.where(exponent == 0, fraction / 512, (8 + fraction) * 2.0 ** (exponent - 10.0))
    value[byte & 127 == 127] = np.nan
    return np.where(byte < 128, value, -value).astype(np.float32)


E4M3 = _e4m3()


def _to_bf16(values: np.ndarray) -> np.ndarray:
    """Rounded to nearest, ties to even; NaN stays."""
    bits = values.view(np.uint32)
    rounded = np.where(np.isnan(values), bits | 1 << 22, bits + 0x7FFF + (bits >> 16 & 1))
    return (rounded >> 16).astype(np.uint16).reshape(-1).view(np.uint8)
