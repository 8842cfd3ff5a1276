"""The kernels' arithmetic in plain torch: what they must equal bit by bit. Runs on any device.

The contract, for a row of weights times a row of activations:

1. Activations: groups of 32; scale = largest * (1/127), integers = round(x * (127 / largest)),
   halves to even; scale times the sum of the integers is kept for weights with offsets.
2. A group's dot product of integers is exact. (q6_k: one for each half of a group.)
3. Eight float32 sums, one for each place of a group in a chunk of 256 weights, add
   fma(float(dot), weight_scale * x_scale, sum) in order of the chunks (q6_k: first halves, then
   second halves); eight others add fma(offset, x_sum, sum), where weights have an offset.
4. result = tree(products + offsets), where tree(s) = ((s0+s1)+(s4+s5)) + ((s2+s3)+(s6+s7)).
5. silu(x) = x * (1 / (1 + exp(-x))), with exp as written here. Every operation is IEEE float32,
   rounded once, and nothing else is fused.

It needs nothing that a processor's vectors of eight floats do not have: cpu_kernels.gemv, which
computes up to sixteen rows of activations, follows it too, and gives the same bits.
"""

from __future__ import annotations

import numpy as np
import torch

from gpu_backend.arrays import Activations, Jobs, Quantized
from gpu_backend.formats import GROUP, GROUPS, parts_of, plane_offsets
from gpu_backend.layouts import Layout, TensorLayout
from gpu_backend.unpack import unpack


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


def silu(x: torch.Tensor) -> torch.Tensor:
    return x * (1.0 / (1.0 + exponential(-x)))


def quantize(x: torch.Tensor) -> Activations:
    """float32 [M, K] to int8 groups. K is a multiple of 32."""
    groups = x.reshape(len(x), -1, GROUP)
    largest = groups.abs().amax(-1)
    tiny = largest < 1e-35
    scale = torch.where(tiny, 0.0, largest * torch.tensor(1 / 127, dtype=torch.float32))
    inverse = torch.where(tiny, 0.0, torch.tensor(127.0) / largest)
    rounded = torch.round(groups * inverse[..., None])
    rounded = torch.where(rounded < 127.0, rounded, 127.0)
    rounded = torch.where(rounded > -127.0, rounded, -127.0)
    first, second = rounded[..., :16].sum(-1), rounded[..., 16:].sum(-1)
    factors = torch.stack([scale, (first + second) * scale, first * scale, second * scale])
    return Activations(rounded.to(torch.int8).reshape(x.shape), factors)


def linear(a: Activations, matrix: Quantized) -> torch.Tensor:
    """a @ matrix.T: float32 [M, out_features]."""
    integers, scales, offsets, kinds = unpack(matrix)  # [N, G, 32], [s, N, G], [o, N, G]
    num_rows, num_groups = len(a.values), integers.shape[1]
    x = a.values.reshape(num_rows, num_groups, GROUP).float()
    pad = -num_groups % GROUPS
    halves = integers.chunk(len(scales), -1)  # exact in float32: sums stay far below 2**24
    terms = []
    for scale, w, values in zip(scales, halves, x.chunk(len(scales), -1), strict=True):
        dots = torch.einsum("mgk,ngk->mng", values, w)
        terms.append((dots, scale[None] * a.factors[0][:, None]))  # [M, N, G]
    sums = _add_chunks(terms, pad)
    if len(offsets):
        x_sums = [a.factors[kind][:, None].expand(-1, len(integers), -1) for kind in kinds]
        weights = [offset[None].expand(num_rows, -1, -1) for offset in offsets]
        sums = sums + _add_chunks(list(zip(weights, x_sums, strict=True)), pad)
    return _tree(sums)


def _add_chunks(terms: list[tuple[torch.Tensor, torch.Tensor]], pad: int) -> torch.Tensor:
    """fma over chunks, all terms of a chunk in turn: [M, N, G] factors to [M, N, 8] sums."""
    padded = [[torch.nn.functional.pad(t, (0, pad)) for t in term] for term in terms]
    sums = torch.zeros_like(padded[0][0][..., :GROUPS])
    for start in range(0, padded[0][0].shape[-1], GROUPS):
        for a, b in padded:
            sums = fma(a[..., start : start + GROUPS], b[..., start : start + GROUPS], sums)
    return sums


def _tree(s: torch.Tensor) -> torch.Tensor:
    pairs = s[..., 0::2] + s[..., 1::2]  # 0+1, 2+3, 4+5, 6+7
    return (pairs[..., 0] + pairs[..., 2]) + (pairs[..., 1] + pairs[..., 3])


def experts(
    slab: torch.Tensor, layout: Layout, jobs: Jobs, h: Activations, out: torch.Tensor
) -> None:
    """out[pair] = down(silu(gate(h)) * up(h)) of each pair's token and expert.

    slab: uint8; h: rows [num_tokens, hidden_size]; out: float32 [num_tokens * top_k, hidden_size].
    """
    for index, begin in enumerate(jobs.begins):
        pairs = torch.from_numpy(
            jobs.pairs[jobs.starts[index] : jobs.starts[index + 1]].astype(np.int64)
        ).to(slab.device)
        tokens = pairs // jobs.top_k
        rows = Activations(h.values[tokens], h.factors[:, tokens])
        gate, up, down = (
            _matrix(slab, int(begin), tensor) for tensor in (layout.gate, layout.up, layout.down)
        )
        inner = silu(linear(rows, gate)) * linear(rows, up)  # [count, expert_size]
        out[pairs] = linear(quantize(inner), down)


def _matrix(slab: torch.Tensor, begin: int, tensor: TensorLayout) -> Quantized:
    return Quantized(slab[begin + tensor.offset :], tensor.format, tensor.shape)


def rearrange(blocks: torch.Tensor, planes: torch.Tensor, format: str, num_blocks: int) -> None:
    """A matrix's blocks, as files have them, to the planes of its format (uint8, not the same)."""
    parts = parts_of(format)
    source = blocks[: num_blocks * sum(p.nbytes for p in parts)].reshape(num_blocks, -1)
    for part, at in zip(parts, plane_offsets(format, num_blocks), strict=True):
        target = planes[at : at + num_blocks * part.nbytes].reshape(num_blocks, -1)
        target.copy_(source[:, part.offset : part.offset + part.nbytes])


def combine(x: torch.Tensor, out: torch.Tensor, weights: torch.Tensor) -> None:
    """x[t] += sum over ranks, in order, of weights[t, rank] * out[t * top_k + rank]."""
    num_tokens, top_k = weights.shape
    rows = out.reshape(num_tokens, top_k, -1)
    total = torch.zeros_like(x)
    for rank in range(top_k):
        total += weights[:, rank, None] * rows[:, rank]
    x += total


__all__ = [
    "combine",
    "experts",
    "exponential",
    "fma",
    "linear",
    "quantize",
    "rearrange",
    "silu",
]
