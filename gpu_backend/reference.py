"""The kernels' arithmetic in plain torch: what they must equal bit by bit. Runs on any device.

The contract, for a row of weights times a row of activations:

1. Activations: groups of 32; scale = largest / 127, rounded to 11 significant bits, integers =
   round(x * (127 / largest)), halves to even in both; scale times the sum of the integers is kept
   for weights with offsets.
2. A group's dot product of integers is exact. (Where its halves have scales of their own,
   one for each half.)
3. Eight float32 sums, one for each place of a group in a chunk of 256 weights (those of a last
   chunk that has fewer take the last places), add
   fma(float(dot), weight_scale * x_scale, sum) in order of the chunks (where halves of groups
   have scales of their own: first halves, then second halves); eight others add
   fma(offset, x_sum, sum), where weights have an offset.
4. result = tree(fma(offsets, offset_factor, products)), where the factor is the format's, and
   tree(s) = ((s0+s1)+(s4+s5)) + ((s2+s3)+(s6+s7)).
5. Biases are added to that. Activations are written in gpu_backend.gating. Every operation is IEEE
   float32, rounded once, and nothing else is fused.

It needs nothing that a processor's vectors of eight floats do not have: cpu_kernels.gemv, which
computes up to sixteen rows of activations, follows it too, and gives the same bits.
"""

from __future__ import annotations

import numpy as np
import torch

from gpu_backend.arrays import Activations, Jobs, Quantized
from gpu_backend.exponential import fma
from gpu_backend.formats import GROUP, GROUPS, LAYOUTS, parts_of, plane_offsets
from gpu_backend.gating import activate
from gpu_backend.layouts import ExpertWeights, TensorLayout
from gpu_backend.unpack import unpack


def quantize(x: torch.Tensor) -> Activations:
    """float32 [M, K] to int8 groups. K is a multiple of 32."""
    groups = x.reshape(len(x), -1, GROUP)
    largest = groups.abs().amax(-1)
    tiny = largest < 1e-35
    scale = torch.where(tiny, 0.0, _to_11_bits(largest / torch.full_like(largest, 127.0)))
    inverse = torch.where(tiny, 0.0, torch.tensor(127.0) / largest)
    rounded = torch.round(groups * inverse[..., None])
    rounded = torch.where(rounded < 127.0, rounded, 127.0)
    rounded = torch.where(rounded > -127.0, rounded, -127.0)
    first, second = rounded[..., :16].sum(-1), rounded[..., 16:].sum(-1)
    factors = torch.stack([scale, (first + second) * scale, first * scale, second * scale])
    return Activations(rounded.to(torch.int8).reshape(x.shape), factors)


def _to_11_bits(scale: torch.Tensor) -> torch.Tensor:
    """The nearest number with as many significant bits as a float16 has; NaN stays NaN."""
    bits = scale.view(torch.int32)
    rounded = (bits + 0xFFF + ((bits >> 13) & 1)) & -0x2000
    return torch.where(bits > 0x7F800000, bits, rounded).view(torch.float32)


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
        offsets = _add_chunks(list(zip(weights, x_sums, strict=True)), pad)
        factor = torch.full_like(sums, LAYOUTS[matrix.format].offset_factor)
        sums = fma(offsets, factor, sums)
    return _tree(sums)


def linear_heads(a: Activations, matrix: Quantized, num_heads: int) -> torch.Tensor:
    """Row i of a times head i % num_heads of the matrix, whose heads lie in planes one after the
    other: float32 [M, out_features / num_heads]."""
    shape = matrix.shape[0] // num_heads, matrix.shape[1]
    parts = matrix.data.split(len(matrix.data) // num_heads)
    y = torch.empty((len(a.values), shape[0]), device=a.values.device)
    for head in range(num_heads):
        rows = Activations(a.values[head::num_heads], a.factors[:, head::num_heads])
        y[head::num_heads] = linear(rows, Quantized(parts[head], matrix.format, shape))
    return y


def _add_chunks(terms: list[tuple[torch.Tensor, torch.Tensor]], pad: int) -> torch.Tensor:
    """fma over chunks, all terms of a chunk in turn: [M, N, G] factors to [M, N, 8] sums."""
    padded = [[_with_zeros(t, pad) for t in term] for term in terms]
    sums = torch.zeros_like(padded[0][0][..., :GROUPS])
    for start in range(0, padded[0][0].shape[-1], GROUPS):
        for a, b in padded:
            sums = fma(a[..., start : start + GROUPS], b[..., start : start + GROUPS], sums)
    return sums


def _with_zeros(groups: torch.Tensor, pad: int) -> torch.Tensor:
    """Whole chunks: `pad` zeros before the groups of a last one that has fewer than eight."""
    whole = groups.shape[-1] // GROUPS * GROUPS if pad else groups.shape[-1]
    return torch.cat([groups[..., :whole], groups.new_zeros((*groups.shape[:-1], pad)),
                      groups[..., whole:]], -1)  # fmt: skip


def _tree(s: torch.Tensor) -> torch.Tensor:
    pairs = s[..., 0::2] + s[..., 1::2]  # 0+1, 2+3, 4+5, 6+7
    return (pairs[..., 0] + pairs[..., 2]) + (pairs[..., 1] + pairs[..., 3])


def experts(
    slab: torch.Tensor, layer: ExpertWeights, jobs: Jobs, h: Activations, out: torch.Tensor
) -> None:
    """out[pair] = down(activation(gate(h), up(h))) of each pair's token and expert.

    slab: uint8; h: rows [num_tokens, hidden_size]; out: float32 [num_tokens * top_k, hidden_size].
    """
    layout = layer.layout
    for index, begin in enumerate(jobs.begins):
        pairs = torch.from_numpy(
            jobs.pairs[jobs.starts[index] : jobs.starts[index + 1]].astype(np.int64)
        ).to(slab.device)
        tokens = pairs // jobs.top_k
        rows = Activations(h.values[tokens], h.factors[:, tokens])
        gate, up, down = (
            _matrix(slab, int(begin), tensor) for tensor in (layout.gate, layout.up, layout.down)
        )
        g, u = linear(rows, gate), linear(rows, up)  # [count, expert_size]
        if layer.biases is not None:
            added = layer.biases[int(jobs.owners[index])]
            of_gate, of_up, of_down = added.split([g.shape[1], u.shape[1], out.shape[1]])
            g, u = g + of_gate, u + of_up
        inner = activate(layer.activation, layer.limit, g, u)
        y = linear(quantize(inner), down)
        out[pairs] = y if layer.biases is None else y + of_down


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
