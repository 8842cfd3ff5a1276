"""Which tensor is to blame when a model computes NaN."""

from __future__ import annotations

from tiered.checkpoints.checkpoint import Checkpoint, CheckpointError, Tensor
from tiered.weights.dequantize import is_finite


def find_damage(checkpoint: Checkpoint) -> CheckpointError:
    """The error that names the first tensor with a weight that is NaN or infinite, if there is one.
    Reads the whole model: slow."""
    for name, tensor in checkpoint.tensors.items():
        if not is_finite(checkpoint.data(name), tensor.format):
            return damaged(tensor)
    return CheckpointError(f"{checkpoint.path}: the model's output is not a number")


def damaged(tensor: Tensor) -> CheckpointError:
    """The error that names a tensor with values that are not numbers."""
    return CheckpointError(
        f"{tensor.file}: tensor {tensor.name} is damaged: it has values that are not numbers"
    )
