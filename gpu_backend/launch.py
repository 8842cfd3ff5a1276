"""Launches the Triton kernels: functions and numbers are those of `gpu_backend.reference`."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch
import triton

from cpu_kernels.formats import FORMATS
from gpu_backend.arrays import Activations, Jobs, Quantized
from gpu_backend.formats import GROUP, check_format, parts_of, plane_offsets
from gpu_backend.kernels.activations import quantize_kernel
from gpu_backend.kernels.experts import combine_kernel, down_kernel, gate_up_kernel
from gpu_backend.kernels.gemm import grouped_gate_up_kernel, grouped_linear_kernel
from gpu_backend.kernels.linear import linear_kernel
from gpu_backend.kernels.rearrange import plane_kernel
from gpu_backend.layouts import Layout
from gpu_backend.tiles import Tiles, one_matrix, tiles_of
from gpu_backend.tuning import Tuning

# Contracting a product and a sum would change the last bit: see gpu_backend.reference.
EXACT: dict[str, Any] = {"enable_fp_fusion": False}


@cache
def emulated() -> bool:
    """Whether kernels run in Triton's interpreter (TRITON_INTERPRET=1)."""
    return bool(triton.knobs.runtime.interpret)


class Launcher:
    """`tuning` says how the work is divided; it never changes a result."""

    def __init__(self, tuning: Tuning | None = None, capability: tuple[int, int] = (8, 0)) -> None:
        self.tuning = tuning or Tuning()
        self.float_dot = capability < (8, 0)

    def quantize(self, x: torch.Tensor) -> Activations:
        """float32 [M, K] to int8 groups. K is a multiple of 32."""
        num_rows, size = x.shape
        if size % GROUP or x.dtype != torch.float32:
            raise ValueError(f"activations must be float32 [., multiple of 32], not {x.shape}")
        num_groups = size // GROUP
        values = torch.empty(x.shape, dtype=torch.int8, device=x.device)
        factors = torch.empty((4, num_rows, num_groups), device=x.device)
        grid = -(-num_groups // 64), num_rows
        plane = num_rows * num_groups
        quantize_kernel[grid](x.contiguous(), values, factors, plane, num_groups, 64, **EXACT)
        return Activations(values, factors)

    def linear(self, a: Activations, matrix: Quantized) -> torch.Tensor:
        """a @ matrix.T: float32 [M, out_features]."""
        check_format(matrix.format)
        num_rows, (n, k) = len(a.values), matrix.shape
        y = torch.empty((num_rows, n), device=a.values.device)
        if num_rows >= self.tuning.prefill_rows:
            tiles = one_matrix(a, self.tuning.tile_tokens)
            self._grouped_linear(matrix.data, 0, matrix.format, (n, k), tiles, a, y, None)
            return y
        rows = self.tuning.rows
        linear_kernel[-(-n // rows), num_rows](
            matrix.data, a.values.view(torch.int32), a.factors, a.factors[0].numel(), y,
            n, k, matrix.format, rows, emulated(), num_warps=self.tuning.warps, **EXACT,
        )  # fmt: skip
        return y

    def experts(
        self, slab: torch.Tensor, layout: Layout, jobs: Jobs, h: Activations, out: torch.Tensor
    ) -> None:
        """out[pair] = down(silu(gate(h)) * up(h)) of each pair's token and expert.

        slab: uint8; h: rows [num_tokens, hidden_size]; out: float32 [num_tokens * top_k,
        hidden_size].
        """
        if not len(jobs.pairs):
            return
        pairs = torch.from_numpy(jobs.pairs.astype(np.int32)).to(slab.device, non_blocking=True)
        tokens = pairs // jobs.top_k
        size = layout.gate.shape[0]
        inner = torch.empty((len(pairs), size), device=slab.device)
        if len(h.values) >= self.tuning.prefill_rows:
            tiles = tiles_of(jobs, self.tuning.tile_tokens, slab.device)
            self._grouped_gate_up(slab, layout, tiles, tokens, h, inner)
            a, down = self.quantize(inner), layout.down
            self._grouped_linear(slab, down.offset, down.format, down.shape, tiles, a, out, pairs)
            return
        begins = torch.from_numpy(np.repeat(jobs.begins, jobs.counts)).to(
            slab.device, non_blocking=True
        )
        self._gate_up(slab, layout, begins, tokens, h, inner)
        self._down(slab, layout, begins, pairs, self.quantize(inner), out)

    def rearrange(
        self, blocks: torch.Tensor, planes: torch.Tensor, format: str, num_blocks: int
    ) -> None:
        """A matrix's blocks, as files have them, to the planes of its format."""
        width = self.tuning.copy_width
        for part, at in zip(parts_of(format), plane_offsets(format, num_blocks), strict=True):
            grid = (-(-num_blocks * part.nbytes // width),)
            plane_kernel[grid](
                blocks, planes[at:], num_blocks, part.offset, part.nbytes,
                FORMATS[format].block_bytes, width,
            )  # fmt: skip

    def combine(self, x: torch.Tensor, out: torch.Tensor, weights: torch.Tensor) -> None:
        """x[t] += sum over ranks, in order, of weights[t, rank] * out[t * top_k + rank]."""
        width = 1024
        combine_kernel[-(-x.shape[1] // width), len(x)](
            x, out, weights, x.shape[1], weights.shape[1], width, emulated(), **EXACT
        )

    def _gate_up(
        self,
        slab: torch.Tensor,
        layout: Layout,
        begins: torch.Tensor,
        tokens: torch.Tensor,
        h: Activations,
        inner: torch.Tensor,
    ) -> None:
        n, k = layout.gate.shape
        rows = self.tuning.rows
        gate_up_kernel[-(-n // rows), len(begins)](
            slab, begins, tokens, h.values.view(torch.int32), h.factors, h.factors[0].numel(),
            inner, layout.gate.offset, layout.up.offset, n, k,
            layout.gate.format, layout.up.format, rows, emulated(),
            num_warps=self.tuning.warps, **EXACT,
        )  # fmt: skip

    def _down(
        self,
        slab: torch.Tensor,
        layout: Layout,
        begins: torch.Tensor,
        pairs: torch.Tensor,
        a: Activations,
        out: torch.Tensor,
    ) -> None:
        n, k = layout.down.shape
        rows = self.tuning.rows
        down_kernel[-(-n // rows), len(begins)](
            slab, begins, pairs, a.values.view(torch.int32), a.factors, a.factors[0].numel(), out,
            layout.down.offset, n, k, layout.down.format, rows, emulated(),
            num_warps=self.tuning.warps, **EXACT,
        )  # fmt: skip

    def _grouped_gate_up(
        self,
        slab: torch.Tensor,
        layout: Layout,
        tiles: Tiles,
        tokens: torch.Tensor,
        h: Activations,
        inner: torch.Tensor,
    ) -> None:
        n, k = layout.gate.shape
        rows = self.tuning.tile_rows
        grouped_gate_up_kernel[-(-n // rows), len(tiles.begins)](
            slab, *tiles, tokens, h.values, h.factors, h.factors[0].numel(), inner,
            layout.gate.offset, layout.up.offset, n, k, layout.gate.format, layout.up.format,
            self.tuning.tile_tokens, rows, self.float_dot, emulated(), **EXACT,
        )  # fmt: skip

    def _grouped_linear(
        self,
        slab: torch.Tensor,
        offset: int,
        format: str,
        shape: tuple[int, int],
        tiles: Tiles,
        a: Activations,
        out: torch.Tensor,
        targets: torch.Tensor | None,
    ) -> None:
        rows = self.tuning.tile_rows
        if targets is None:
            targets = torch.arange(len(a.values), dtype=torch.int32, device=slab.device)
        grouped_linear_kernel[-(-shape[0] // rows), len(tiles.begins)](
            slab, *tiles, targets, a.values, a.factors, a.factors[0].numel(), out, offset,
            *shape, format, self.tuning.tile_tokens, rows, self.float_dot, emulated(), **EXACT,
        )  # fmt: skip
