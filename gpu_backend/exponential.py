"""The exponential function, and the sum of a product, whose rounding is fixed."""

from __future__ import annotations

import torch

from cpu_kernels.exponential_terms import (
    COEFFICIENTS,
    LARGEST,
    LN2_HIGH,
    LN2_LOW,
    LOG2_E,
    SHIFT,
)


def fma(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """a * b + c in float32, rounded once: the product is exact in float64."""
    return (a.double() * b.double() + c.double()).float()


def exponential(x: torch.Tensor) -> torch.Tensor:
    """e ** x, to about 1e-7; 0 below -87, 6e37 above 87. See cpu_kernels.exponential."""

    def constant(value: float) -> torch.Tensor:
        return torch.full_like(x, value)

    y = torch.where(x > LARGEST, constant(LARGEST), x)
    shifted = fma(y, constant(LOG2_E), constant(SHIFT))
    n = shifted - SHIFT
    r = fma(n, constant(-LN2_HIGH), y)
    r = fma(n, constant(-LN2_LOW), r)
    p = constant(COEFFICIENTS[0])
    for coefficient in COEFFICIENTS[1:]:
        p = fma(p, r, constant(coefficient))
    p = fma(p, r * r, r + 1.0)
    bits = p.view(torch.int32) + (shifted.view(torch.int32) << 23)
    return torch.where(y < -LARGEST, constant(0.0), bits.view(torch.float32))
