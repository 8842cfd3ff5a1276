"""RMS norm and, where a norm has biases, layer norm: see cpu_kernels.norm."""

from __future__ import annotations

import torch


def rms_norm(x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
    """x / rms(x) * weight over the last dimension, float32; without weights, x / rms(x)."""
    normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return normed if weight is None else normed * weight


def layer_norm(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float
) -> torch.Tensor:
    return torch.nn.functional.layer_norm(x, x.shape[-1:], weight, bias, eps)


def norm_rows(x: torch.Tensor, weights: torch.Tensor, eps: float) -> torch.Tensor:
    """RMS norm with weights [size], or layer norm with [2, size]: weights, then biases."""
    if weights.ndim == 1:
        return rms_norm(x, weights, eps)
    return layer_norm(x, weights[0], weights[1], eps)
