"""Launches the Triton kernels: functions and numbers are those of `gpu_backend.reference`."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, wraps
from typing import Any, NamedTuple, TypeVar, cast

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
from gpu_backend.layouts import ExpertWeights, TensorLayout
from gpu_backend.tiles import Tiles, one_matrix, tiles_of
from gpu_backend.tuning import Tuning

# What there may be very many of (pairs, heads of a prompt's tokens) is on a grid's first axis: CUDA
# allows 65535 programs on the others.

# Contracting a product and a sum would change the last bit: see gpu_backend.reference.
EXACT: dict[str, Any] = {"enable_fp_fusion": False}


@cache
def emulated() -> bool:
    """Whether kernels run in Triton's interpreter (TRITON_INTERPRET=1)."""
    return bool(triton.knobs.runtime.interpret)


Method = TypeVar("Method", bound=Callable[..., Any])


def on_card(method: Method) -> Method:
    """Triton launches on the current device, of which each thread has one."""

    @wraps(method)
    def launch(self: Launcher, *arguments: Any) -> Any:
        with torch.cuda.device(self.index):
            return method(self, *arguments)

    return cast(Method, launch)


class Launcher:
    """`tuning` says how the work is divided; it never changes a result. `index` is the CUDA
    device's; -1: there is none."""

    def __init__(
        self,
        tuning: Tuning | None = None,
        capability: tuple[int, int] = (8, 0),
        index: int = -1,
    ) -> None:
        self.tuning = tuning or Tuning()
        self.index = index
        self.float_dot = capability < (8, 0)

    def try_out(self, device: torch.device) -> None:
        """Run a small kernel. Raises RuntimeError that says what kernels need, if it fails."""
        try:
            self.quantize(torch.zeros((1, GROUP), device=device)).values.cpu()
        except Exception as error:  # of compilers, drivers and Triton: of any class
            raise RuntimeError(
                f"Triton cannot run its kernels on {device} ({type(error).__name__}: {error}). It "
                "needs a C compiler and Python's headers (Debian: apt install gcc python3-dev) and "
                "a driver that is no older than torch's CUDA"
            ) from error

    @on_card
    def quantize(self, x: torch.Tensor) -> Activations:
        """float32 [M, K] to int8 groups. K is a multiple of 32."""
        num_rows, size = x.shape
        if size % GROUP or x.dtype != torch.float32:
            raise ValueError(f"activations must be float32 [., multiple of 32], not {x.shape}")
        num_groups = size // GROUP
        values = torch.empty(x.shape, dtype=torch.int8, device=x.device)
        factors = torch.empty((4, num_rows, num_groups), device=x.device)
        grid = num_rows, -(-num_groups // 64)
        plane = num_rows * num_groups
        quantize_kernel[grid](x.contiguous(), values, factors, plane, num_groups, 64, **EXACT)
        return Activations(values, factors)

    @on_card
    def linear(self, a: Activations, matrix: Quantized) -> torch.Tensor:
        """a @ matrix.T: float32 [M, out_features]."""
        check_format(matrix.format)
        num_rows, (n, k) = len(a.values), matrix.shape
        y = torch.empty((num_rows, n), device=a.values.device)
        if num_rows >= self.tuning.prefill_rows:
            tiles = one_matrix(a, self.tuning.tile_tokens)
            self._grouped_linear(matrix.data, _Whole(matrix.format, (n, k)), tiles, a, y)
            return y
        rows = self.tuning.rows
        linear_kernel[-(-n // rows), num_rows](
            matrix.data, a.values.view(torch.int32), a.factors, a.factors[0].numel(), y,
            n, k, matrix.format, rows, emulated(), num_warps=self.tuning.warps, **EXACT,
        )  # fmt: skip
        return y

    @on_card
    def linear_heads(self, a: Activations, matrix: Quantized, num_heads: int) -> torch.Tensor:
        """Row i of a times head i % num_heads of the matrix, whose heads lie in planes one after
        the other: float32 [M, out_features / num_heads]. Heads are experts with one matrix."""
        (num_rows, k), device = a.values.shape, a.values.device
        n, rows = matrix.shape[0] // num_heads, self.tuning.rows
        numbers = torch.arange(num_rows, dtype=torch.int32, device=device)
        begins = numbers.long() % num_heads * (len(matrix.data) // num_heads)
        y = torch.empty((num_rows, n), device=device)
        down_kernel[num_rows, -(-n // rows)](
            matrix.data, begins, numbers, numbers, a.values.view(torch.int32), a.factors,
            a.factors[0].numel(), a.factors, y, 0, n, k, matrix.format, False, rows, emulated(),
            num_warps=self.tuning.warps, **EXACT,
        )  # fmt: skip
        return y

    @on_card
    def experts(
        self, slab: torch.Tensor, layer: ExpertWeights, jobs: Jobs, h: Activations,
        out: torch.Tensor,
    ) -> None:  # fmt: skip
        """out[pair] = down(activation(gate(h), up(h))) of each pair's token and expert.

        slab: uint8; h: rows [num_tokens, hidden_size]; out: float32 [num_tokens * top_k,
        hidden_size].
        """
        if not len(jobs.pairs):
            return
        pairs = torch.from_numpy(jobs.pairs.astype(np.int32)).to(slab.device, non_blocking=True)
        tokens = pairs // jobs.top_k
        size = layer.layout.gate.shape[0]
        inner = torch.empty((len(pairs), size), device=slab.device)
        if len(h.values) >= self.tuning.prefill_rows:
            tiles = tiles_of(jobs, self.tuning.tile_tokens, slab.device)
            self._grouped_gate_up(slab, layer, tiles, tokens, h, inner)
            a, down = self.quantize(inner), layer.layout.down
            self._grouped_linear(slab, down, tiles, a, out, pairs, layer.biases)
            return
        begins, owners = (
            torch.from_numpy(np.repeat(array, jobs.counts)).to(slab.device, non_blocking=True)
            for array in (jobs.begins, jobs.owners)
        )
        self._gate_up(slab, layer, begins, owners, tokens, h, inner)
        self._down(slab, layer, begins, owners, pairs, self.quantize(inner), out)

    @on_card
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

    @on_card
    def combine(self, x: torch.Tensor, out: torch.Tensor, weights: torch.Tensor) -> None:
        """x[t] += sum over ranks, in order, of weights[t, rank] * out[t * top_k + rank]."""
        width = 1024
        combine_kernel[len(x), -(-x.shape[1] // width)](
            x, out, weights, x.shape[1], weights.shape[1], width, emulated(), **EXACT
        )

    def _gate_up(
        self,
        slab: torch.Tensor,
        layer: ExpertWeights,
        begins: torch.Tensor,
        owners: torch.Tensor,
        tokens: torch.Tensor,
        h: Activations,
        inner: torch.Tensor,
    ) -> None:
        gate, up, rows = layer.layout.gate, layer.layout.up, self.tuning.rows
        gate_up_kernel[-(-gate.shape[0] // rows), len(begins)](
            slab, begins, owners, tokens, h.values.view(torch.int32), h.factors,
            h.factors[0].numel(), _biases(layer.biases, h), inner, gate.offset, up.offset,
            *gate.shape, gate.format, up.format, layer.activation, layer.limit,
            layer.biases is not None, rows, emulated(), num_warps=self.tuning.warps, **EXACT,
        )  # fmt: skip

    def _down(
        self,
        slab: torch.Tensor,
        layer: ExpertWeights,
        begins: torch.Tensor,
        owners: torch.Tensor,
        pairs: torch.Tensor,
        a: Activations,
        out: torch.Tensor,
    ) -> None:
        down, rows = layer.layout.down, self.tuning.rows
        down_kernel[len(begins), -(-down.shape[0] // rows)](
            slab, begins, owners, pairs, a.values.view(torch.int32), a.factors,
            a.factors[0].numel(), _biases(layer.biases, a), out, down.offset, *down.shape,
            down.format, layer.biases is not None, rows, emulated(),
            num_warps=self.tuning.warps, **EXACT,
        )  # fmt: skip

    def _grouped_gate_up(
        self,
        slab: torch.Tensor,
        layer: ExpertWeights,
        tiles: Tiles,
        tokens: torch.Tensor,
        h: Activations,
        inner: torch.Tensor,
    ) -> None:
        gate, up, rows = layer.layout.gate, layer.layout.up, self.tuning.tile_rows
        grouped_gate_up_kernel[-(-gate.shape[0] // rows), len(tiles.begins)](
            slab, *tiles, tokens, h.values, h.factors, h.factors[0].numel(),
            _biases(layer.biases, h), inner, gate.offset, up.offset, *gate.shape, gate.format,
            up.format, layer.activation, layer.limit, layer.biases is not None,
            self.tuning.tile_tokens, rows, self.float_dot, emulated(), **EXACT,
        )  # fmt: skip

    def _grouped_linear(
        self,
        slab: torch.Tensor,
        matrix: TensorLayout,
        tiles: Tiles,
        a: Activations,
        out: torch.Tensor,
        targets: torch.Tensor | None = None,
        biases: torch.Tensor | None = None,
    ) -> None:
        rows = self.tuning.tile_rows
        if targets is None:
            targets = torch.arange(len(a.values), dtype=torch.int32, device=slab.device)
        grouped_linear_kernel[-(-matrix.shape[0] // rows), len(tiles.begins)](
            slab, *tiles, targets, a.values, a.factors, a.factors[0].numel(),
            _biases(biases, a), out, matrix.offset, *matrix.shape, matrix.format,
            biases is not None, self.tuning.tile_tokens, rows, self.float_dot, emulated(), **EXACT,
        )  # fmt: skip


class _Whole(NamedTuple):
    """A matrix that begins where its data does."""

    format: str
    shape: tuple[int, int]
    offset: int = 0


def _biases(biases: torch.Tensor | None, a: Activations) -> torch.Tensor:
    """Where there are none, a pointer that is not followed."""
    return a.factors if biases is None else biases
