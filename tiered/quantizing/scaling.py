"""Activation-aware scaling: columns that see large inputs are stored larger, and what makes the
inputs, smaller, so that rounding hurts them less. https://arxiv.org/abs/2306.00978
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from tiered.config import ModelConfig
from tiered.quantizing.inputs import Inputs
from tiered.quantizing.rewritten import Rewritten
from tiered.quantizing.rounding import round_nearest
from tiered.weights.dequantize import dequantize

STRENGTHS = np.linspace(0, 1, 11)  # exponents that are tried; 0 scales nothing
NUM_ROWS = 128  # of inputs that an error is measured with

Pair = tuple[np.ndarray, Inputs]  # a matrix, float32 [rows, columns], and what goes into it


def best_scale(pairs: Sequence[Pair], format: str) -> np.ndarray:
    """Float32 [columns]: multiply columns with it, and divide inputs by it, for the least error of
    the products, all matrices together."""
    columns = pairs[0][0].shape[1]
    size = np.mean([np.sqrt(inputs.importance) for _, inputs in pairs], axis=0)
    best, result = np.inf, np.ones(columns, np.float32)
    for strength in STRENGTHS:
        scale = size.astype(np.float64) ** strength
        scale = (scale / np.sqrt(scale.max() * scale.min())).astype(np.float32)
        error = sum(scaled_error(values, inputs, format, scale) for values, inputs in pairs)
        if error < best:
            best, result = error, scale
    return result


def scaled_error(values: np.ndarray, inputs: Inputs, format: str, scale: np.ndarray) -> float:
    """Squared error of the product with the inputs."""
    data = round_nearest(values * scale, format, inputs.divided(scale).importance)
    lost = dequantize(data.reshape(-1), format, values.shape) / scale - values
    some = np.linspace(0, len(inputs.rows) - 1, min(NUM_ROWS, len(inputs.rows))).astype(np.int64)
    rows = inputs.rows[some] * inputs.weights[some, None]
    return float(np.square(rows @ lost.T).sum() / max(np.square(inputs.weights[some]).sum(), 1e-30))


def scales_inputs(config: ModelConfig) -> bool:
    """Whether what goes into experts comes from a norm that nothing but them, the router and a
    shared expert reads."""
    return not config.output_norms


def scales_inside(config: ModelConfig) -> bool:
    """Whether an expert's `up` only multiplies what goes into `down`."""
    return config.activation != "clamped_silu" and not config.expert_biases


def divide_inputs(checkpoint: Rewritten, layer: int, scale: np.ndarray) -> None:
    """The layer's norm gives its results divided by `scale`; router and shared expert, which read
    them, too, make good for it."""
    prefix, offset = f"layers.{layer}.", np.float32(checkpoint.config.norm_offset)
    changes: dict[str, Callable[[np.ndarray], np.ndarray]] = {
        "ffn_norm": lambda norm: (norm + offset) / scale - offset,
        "ffn_norm_bias": lambda bias: bias / scale,
        **dict.fromkeys(
            ("router", "shared.gate", "shared.up", "shared.scale"), lambda matrix: matrix * scale
        ),
    }
    for name, change in changes.items():
        if prefix + name in checkpoint.tensors:
            checkpoint.rewrite(prefix + name, change(checkpoint.float32(prefix + name)))
