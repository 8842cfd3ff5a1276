"""Gates: what lies between an expert's first matrices and its last. Numbers are the CPU's."""

from __future__ import annotations

import math

import torch

from gpu_backend.exponential import exponential

ACTIVATIONS = ("silu", "clamped_silu", "gelu_tanh")
CLAMPED_SLOPE = 1.702  # https://arxiv.org/abs/2508.10925


def activate(activation: str, limit: float, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """activation(gate, up), float32."""
    if activation == "silu":
        return silu(gate) * up
    if activation == "clamped_silu":
        # Selected like this, what is not a number stays so.
        gate = torch.where(gate > limit, limit, gate)
        up = torch.where(up > limit, limit, up)
        up = torch.where(up < -limit, -limit, up)
        return gate * sigmoid(gate * CLAMPED_SLOPE) * (up + 1.0)
    # gelu_tanh, with the tanh that approximates it: https://arxiv.org/abs/1606.08415.
    twice = (gate * gate * 0.044715 + 1.0) * gate * (2 * math.sqrt(2 / math.pi))
    return gate * sigmoid(twice) * up


def silu(x: torch.Tensor) -> torch.Tensor:
    return x * sigmoid(x)


def sigmoid(x: torch.Tensor) -> torch.Tensor:
    return 1.0 / (1.0 + exponential(-x))


def check_activation(activation: str) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, not {activation!r}")


def soft_cap(x: torch.Tensor, cap: float) -> torch.Tensor:
    """cap * tanh(x / cap)"""
    return cap * torch.tanh(x / cap)
