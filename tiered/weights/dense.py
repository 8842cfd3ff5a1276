"""Dense weights: the matrices that every token uses, as the arithmetic wants them."""

from __future__ import annotations

import math
import re

import numpy as np

from cpu_kernels.formats import FORMATS
from tiered.checkpoints.checkpoint import Checkpoint, Tensor
from tiered.weights.quantize import GROUP_SIZE, quantize_rows

# Large matrices that are kept in 8 bits beside experts of 4. Embeddings, head, router and norms
# stay as stored.
_LARGE = re.compile(
    r"layers\.\d+\.([qkvo]|q_a|kv_a|delta\.(qkvz|qkv|z|o)|mamba2\.(in|o)|mtp\.projection|(ffn|shared)\.(gate|up|down))"
)


def dense_matrix(
    checkpoint: Checkpoint, name: str, quantize: str
) -> tuple[np.ndarray, str, tuple[int, int]]:
    """(data uint8 [nbytes], format, shape [out_features, in_features]) of a dense matrix.

    What the file has in a usable form is a view of its memory map. Unless `quantize` is "none", a
    float checkpoint's large matrices become q8_0.
    """
    tensor = checkpoint.tensors[name]
    data, format = checkpoint.data(name), dense_format(tensor, quantize)
    shape = tensor.shape[0], tensor.shape[1]
    if format != tensor.format:
        return quantize_rows(data, tensor, format).reshape(-1), format, shape
    return data if is_usable(tensor) else data.copy(), format, shape


def dense_format(tensor: Tensor, quantize: str) -> str:
    """The number format that a dense tensor is computed in."""
    if quantize != "none" and FORMATS[tensor.format].is_float and _LARGE.fullmatch(tensor.name):
        return tensor.format if tensor.shape[-1] % GROUP_SIZE else "q8_0"
    return tensor.format


def dense_bytes(checkpoint: Checkpoint, quantize: str) -> int:
    """Bytes of all dense tensors as the arithmetic wants them."""
    return sum(
        matrix_bytes(dense_format(tensor, quantize), tensor.shape)
        for tensor in dense_tensors(checkpoint)
    )


def dense_bytes_by_layer(checkpoint: Checkpoint, quantize: str) -> list[int]:
    """The same by layer; at the end, what the output needs: the last norm, and the head, which in
    many models is the embedding table."""
    nbytes = [0] * (checkpoint.config.num_layers + 1)
    is_tied = "head" not in checkpoint.tensors
    for tensor in dense_tensors(checkpoint):
        match = re.match(r"layers\.(\d+)\.", tensor.name)
        if match is not None or tensor.name != "embed" or is_tied:
            place = int(match[1]) if match else -1
            nbytes[place] += matrix_bytes(dense_format(tensor, quantize), tensor.shape)
    return nbytes


def dense_tensors(checkpoint: Checkpoint) -> list[Tensor]:
    """All tensors that belong to no expert."""
    return [tensor for name, tensor in checkpoint.tensors.items() if ".experts." not in name]


def matrix_bytes(format: str, shape: tuple[int, ...]) -> int:
    return math.prod(shape[:-1]) * int(FORMATS[format].row_bytes(shape[-1]))


def is_usable(tensor: Tensor) -> bool:
    """Whether values can be computed with where they lie: in rows, and floats aligned."""
    return (
        tensor.packed is None
        and tensor.offset % {"f32": 4, "f16": 2, "bf16": 2}.get(tensor.format, 1) == 0
    )
