"""What lies between an expert's first matrices and its last: see gpu_backend.gating."""

from __future__ import annotations

import triton
import triton.language as tl

from gpu_backend.kernels.exact import sigmoid

CLAMPED_SLOPE = tl.constexpr(1.702)
GELU_CUBE = tl.constexpr(0.044715)
GELU_SLOPE = tl.constexpr(1.5957691216057308)  # 2 * sqrt(2 / pi)


@triton.jit
def activate(gate, up, ACTIVATION: tl.constexpr, LIMIT: tl.constexpr, EMULATE: tl.constexpr):
    """activation(gate, up) of float32."""
    if ACTIVATION == "silu":
        return gate * sigmoid(gate, EMULATE) * up
    elif ACTIVATION == "clamped_silu":
        # Selected like this, what is not a number stays so.
        gate = tl.where(gate > LIMIT, LIMIT, gate)
        up = tl.where(up > LIMIT, LIMIT, up)
        up = tl.where(up < -LIMIT, -LIMIT, up)
        slope = tl.full(gate.shape, CLAMPED_SLOPE, tl.float32)
        return gate * sigmoid(gate * slope, EMULATE) * (up + 1.0)
    else:
        tl.static_assert(ACTIVATION == "gelu_tanh")
        cube = tl.full(gate.shape, GELU_CUBE, tl.float32)
        slope = tl.full(gate.shape, GELU_SLOPE, tl.float32)
        twice = (gate * gate * cube + 1.0) * gate * slope
        return gate * sigmoid(twice, EMULATE) * up
