"""Weight matrices on the device, in any number format."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import torch

from cpu_kernels.formats import FORMATS
from gpu_backend import reference
from gpu_backend.arrays import Activations, Quantized
from gpu_backend.formats import GROUP, check_format
from gpu_backend.unpack import dequantize

WIDENED = 1 << 23  # values
FLOATS = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


class Arithmetic(Protocol):
    """gpu_backend.reference, or a Launcher of the Triton kernels."""

    def quantize(self, x: torch.Tensor) -> Activations: ...

    def linear(self, a: Activations, matrix: Quantized) -> torch.Tensor: ...

    def linear_heads(self, a: Activations, matrix: Quantized, num_heads: int) -> torch.Tensor: ...

    def rearrange(
        self, blocks: torch.Tensor, planes: torch.Tensor, format: str, num_blocks: int
    ) -> None: ...


class Rows:
    """Rows of activations; what quantized matrices want of them is computed once."""

    def __init__(self, x: torch.Tensor, arithmetic: Any) -> None:
        self.x = x  # float32 [M, K]
        self._arithmetic: Arithmetic = arithmetic
        self._quantized: Activations | None = None

    def quantized(self) -> Activations:
        if self._quantized is None:
            self._quantized = self._arithmetic.quantize(self.x)
        return self._quantized


class Matrix:
    """[out_features, in_features]. Comes to the device when it is first multiplied with.

    `data`: uint8, rows of blocks of `format`; kept, for embedding tables. `exact`: quantized
    weights are multiplied with float32 activations instead of int8 ones.
    """

    def __init__(
        self,
        data: np.ndarray,
        format: str,
        shape: tuple[int, int],
        device: torch.device,
        arithmetic: Any,
        bias: np.ndarray | None = None,
        exact: bool = False,
    ) -> None:
        if format not in FLOATS:
            check_format(format)
        row_bytes = FORMATS[format].row_bytes(shape[1])
        if data.dtype != np.uint8 or data.size < shape[0] * row_bytes:
            raise ValueError(
                f"a {format} matrix of shape {shape} has {shape[0] * row_bytes} bytes, "
                f"but only {data.size} are there"
            )
        self.format, self.shape = format, (int(shape[0]), int(shape[1]))
        self._data = data.reshape(-1)[: shape[0] * row_bytes].reshape(shape[0], row_bytes)
        self._device, self._arithmetic, self._exact = device, arithmetic, exact
        self._bias = None if bias is None else torch.tensor(bias, device=device)
        self._quantized: Quantized | None = None
        self._floats: torch.Tensor | None = None
        self._num_heads = 1

    def load(self, num_heads: int = 1) -> Matrix:
        """Bring the weights to the device now; each head's rows by themselves, for
        `multiply_heads`."""
        if self.format in FLOATS:
            if self._floats is None:
                self._floats = _floats(self._data, self.format).to(self._device)
        elif self._quantized is None:
            rows = self._data.reshape(num_heads, -1, self._data.shape[1])
            shape = rows.shape[1], self.shape[1]
            heads = [
                _in_planes(head, self.format, shape, self._device, self._arithmetic).data
                for head in rows
            ]
            # Kernels want each head to begin at a multiple of 16.
            data = heads[0] if num_heads == 1 else torch.cat([_aligned(head) for head in heads])
            self._quantized = Quantized(data, self.format, self.shape)
        self._num_heads = num_heads
        return self

    def multiply(self, rows: Rows) -> torch.Tensor:
        """float32 [M, out_features]."""
        self.load()
        if self._floats is not None:
            y = _linear(rows.x, self._floats)
        else:
            assert self._quantized is not None
            if self._exact:
                y = torch.nn.functional.linear(rows.x, dequantize(self._quantized))
            else:
                y = self._arithmetic.linear(rows.quantized(), self._quantized)
        return y if self._bias is None else y + self._bias

    def multiply_heads(self, x: torch.Tensor) -> torch.Tensor:
        """Each head's rows with its own rows of the matrix, which was loaded for so many heads:
        float32 [M, num_heads, in_features] to [M, num_heads, out_features / num_heads]."""
        if self._floats is not None:
            weights = self._floats.float().unflatten(0, (self._num_heads, -1))
            return torch.einsum("mhk,hnk->mhn", x, weights)
        assert self._quantized is not None
        if self._exact:
            nbytes = len(self._quantized.data) // self._num_heads
            shape = self.shape[0] // self._num_heads, self.shape[1]
            weights = torch.stack(
                [
                    dequantize(Quantized(data, self.format, shape))
                    for data in self._quantized.data.split(nbytes)
                ]
            )
            return torch.einsum("mhk,hnk->mhn", x, weights)
        a = self._arithmetic.quantize(x.flatten(0, 1).contiguous())
        return self._arithmetic.linear_heads(a, self._quantized, self._num_heads).view(
            *x.shape[:2], -1
        )

    def rows(self, ids: np.ndarray) -> torch.Tensor:
        """Some rows as float32 [len(ids), in_features] on the device, without the rest."""
        data = self._data[np.asarray(ids, np.int64)]
        if self.format in FLOATS:
            return _floats(data, self.format).float().to(self._device)
        cpu = torch.device("cpu")
        shape = len(data), self.shape[1]
        return dequantize(_in_planes(data, self.format, shape, cpu, reference)).to(self._device)


def _linear(x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """x @ weights.T in float32. Of a head in 16 bits, which budgets count as that, only a part is
    there in 32 bits at once."""
    if weights.dtype == torch.float32:
        return torch.nn.functional.linear(x, weights)
    parts = weights.split(max(1, WIDENED // weights.shape[1]))
    return torch.cat([torch.nn.functional.linear(x, part.float()) for part in parts], -1)


def _floats(data: np.ndarray, format: str) -> torch.Tensor:
    return torch.from_numpy(np.array(data)).view(FLOATS[format])


def _in_planes(
    data: np.ndarray,
    format: str,
    shape: tuple[int, int],
    device: torch.device,
    arithmetic: Any,
) -> Quantized:
    assert shape[1] % GROUP == 0  # all blocks are whole groups
    blocks = torch.from_numpy(np.array(data)).reshape(-1).to(device)
    planes = torch.empty_like(blocks)
    arithmetic.rearrange(blocks, planes, format, shape[0] * shape[1] // FORMATS[format].block_size)
    return Quantized(planes, format, shape)


def _aligned(data: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.pad(data, (0, -len(data) % 16))
