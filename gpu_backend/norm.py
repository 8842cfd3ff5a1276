"""Root mean square norm."""

from __future__ import annotations

import torch


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / rms(x) * weight over the last dimension, float32."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight
