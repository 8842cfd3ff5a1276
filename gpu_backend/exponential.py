"""The exponential function, and the sum of a product, whose rounding is fixed."""

from __future__ import annotations

import torch


def fma(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """a * b + c in float32, rounded once: the product is exact in float64."""
    return (a.double() * b.double() + c.double()).float()


def exponential(x: torch.Tensor) -> torch.Tensor:
    """e ** x, to about 1e-7; 0 below -87, 6e37 above 87. See cpu_kernels.exponential."""

    def constant(value: float) -> torch.Tensor:
        return torch.full_like(x, value)

    y = torch.where(x > 87.0, constant(87.0), x)
    shifted = fma(y, constant(1.44269504), constant(12582912.0))
    n = shifted - 12582912.0
    r = fma(n, constant(-0.693145751953125), y)
    r = fma(n, constant(-1.42860682e-06), r)
    p = constant(1.9875691500e-4)
    for coefficient in (
        1.3981999507e-3,
        8.3334519073e-3,
        4.1665795894e-2,
        1.6666665459e-1,
        5.0000001201e-1,
    ):
        p = fma(p, r, constant(coefficient))
    p = fma(p, r * r, r + 1.0)
    bits = p.view(torch.int32) + (shifted.view(torch.int32) << 23)
    return torch.where(y < -87.0, constant(0.0), bits.view(torch.float32))
