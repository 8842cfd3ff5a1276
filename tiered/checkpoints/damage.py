"""Which tensor is to blame when a model computes NaN."""

from __future__ import annotations

from tiered.checkpoints.checkpoint import Checkpoint, CheckpointError, Tensor
from tiered.weights.dequantize import is_finite


def find_damage(checkpoint: Checkpoint) -> Tensor | None:
    """The first tensor with a weight that is NaN or infinite. Reads the whole model: slow."""
    for name, tensor in checkpoint.tensors.items():
        if not is_finite(checkpoint.data(name), tensor.format):
            return tensor
    return None


def damaged(tensor: Tensor) -> CheckpointError:
    """The error that names a tensor with values that are not numbers."""
    return CheckpointError(
        f"{tensor.file}: tensor {tensor.name} is damaged: it has values that are not numbers"
    )
