"""Triton kernels in Triton's interpreter, against gpu_backend.reference: equal, bit by bit.

Not collected by name: the interpreter must be chosen before triton is imported, so
tests/test_gpu_kernels.py runs this file in a process of its own, with TRITON_INTERPRET=1.
"""

from __future__ import annotations

from typing import NamedTuple

import naive_formats
import numpy as np
import pytest
import torch

from cpu_kernels.formats import FORMATS
from gpu_backend import reference
from gpu_backend.arrays import Jobs, Quantized
from gpu_backend.formats import QUANTIZED
from gpu_backend.launch import Launcher
from gpu_backend.layouts import ExpertWeights
from gpu_backend.tuning import Tuning

NUM_TOKENS, TOP_K = 2, 2
# The interpreter takes its time for each program, whatever its size: few and large ones.
launcher = Launcher(Tuning(rows=256, tile_rows=256, copy_width=1 << 18))


def random_matrix(rng, format, shape):
    """A matrix in planes, as the reference rearranges it."""
    blocks = torch.from_numpy(naive_formats.random_matrix(rng, format, shape).reshape(-1))
    num_blocks = shape[0] * shape[1] // FORMATS[format].block_size
    planes = torch.empty_like(blocks)
    reference.rearrange(blocks, planes, format, num_blocks)
    again = torch.zeros_like(blocks)
    launcher.rearrange(blocks, again, format, num_blocks)
    assert torch.equal(again, planes)
    return Quantized(planes, format, shape)


def random_rows(rng, num_rows, size):
    """Rows with a large, a tiny and an empty group among them."""
    x = rng.standard_normal((num_rows, size)).astype(np.float32)
    x[0, :32] *= 1e4
    x[-1, :32] *= 1e-37
    x[-1, 32:64] = 0
    return torch.from_numpy(x)


def columns(format):
    """Not whole chunks of 256 where the format allows it."""
    return {32: 288, 64: 320, 128: 384, 256: 512}[FORMATS[format].block_size]


def test_quantize():
    x = random_rows(np.random.default_rng(0), 3, 96)
    expected, got = reference.quantize(x), launcher.quantize(x)
    assert torch.equal(got.values, expected.values)
    assert torch.equal(got.factors, expected.factors)


@pytest.mark.parametrize("num_rows", [2, 17])  # decode kernel, matrix product of two tiles
@pytest.mark.parametrize("format", QUANTIZED)
def test_linear(format, num_rows):
    rng = np.random.default_rng(1)
    matrix = random_matrix(rng, format, (24, columns(format)))
    a = reference.quantize(random_rows(rng, num_rows, matrix.shape[1]))
    assert torch.equal(launcher.linear(a, matrix), reference.linear(a, matrix))


def test_float_matrix_products_are_as_exact():
    rng = np.random.default_rng(2)
    old_card = Launcher(launcher.tuning, capability=(7, 5))
    for format in ("q8_0", "q6_k"):
        matrix = random_matrix(rng, format, (8, 256))
        a = reference.quantize(random_rows(rng, 16, 256))
        assert torch.equal(old_card.linear(a, matrix), reference.linear(a, matrix))


class Tensor(NamedTuple):
    format: str
    shape: tuple[int, int]
    offset: int


class Layout(NamedTuple):
    gate: Tensor
    up: Tensor
    down: Tensor
    nbytes: int


def random_slab(rng, gate, up, down, num_slots, hidden, size):
    """Slots with a random expert each: uint8 [num_slots * nbytes], and their layout."""
    shapes = (size, hidden), (size, hidden), (hidden, size)
    tensors, at = [], 0
    for format, shape in zip((gate, up, down), shapes, strict=True):
        tensors.append(Tensor(format, shape, at))
        at += -(-shape[0] * FORMATS[format].row_bytes(shape[1]) // 64) * 64
    slab = torch.zeros(num_slots * at, dtype=torch.uint8)
    for slot in range(num_slots):
        for tensor in tensors:
            data = random_matrix(rng, tensor.format, tensor.shape).data
            start = slot * at + tensor.offset
            slab[start : start + len(data)] = data
    return slab, Layout(*tensors, at)


@pytest.mark.parametrize("num_tokens", [NUM_TOKENS, 20])
@pytest.mark.parametrize(
    ("gate", "up", "down", "activation"),
    [
        ("q4_k", "q4_k", "q6_k", "silu"),
        ("q8_0", "q5_k", "q4_1", "gelu_tanh"),
        ("mxfp4", "mxfp4", "mxfp4", "clamped_silu"),
    ],
)
def test_experts(gate, up, down, activation, num_tokens):
    rng = np.random.default_rng(3)
    hidden, size = 256, (256 if down == "q6_k" else 96)
    slab, layout = random_slab(rng, gate, up, down, 3, hidden, size)
    biases = None
    if activation == "clamped_silu":  # as in gpt-oss
        biases = torch.from_numpy(rng.standard_normal((9, 2 * size + hidden), np.float32))
    layer = ExpertWeights(layout, activation, 0.7, biases)
    chosen = np.arange(num_tokens) % 2  # experts 0 and 2, or 1 and 2
    pairs = np.concatenate([np.flatnonzero(chosen == e) * TOP_K for e in (0, 1)])
    pairs = np.concatenate([pairs, np.arange(num_tokens) * TOP_K + 1]).astype(np.int32)
    starts = np.cumsum([0, *np.bincount(chosen, minlength=2), num_tokens]).astype(np.int32)
    begins = np.array([2, 0, 1]) * layout.nbytes
    owners = np.array([8, 0, 5], np.int32)
    jobs = Jobs(begins.astype(np.int64), owners, starts, pairs, TOP_K)
    # Of the size that activations have: the cube of a larger one would be infinite.
    h = reference.quantize(random_rows(rng, num_tokens, hidden) / 100)
    expected = torch.zeros(num_tokens * TOP_K, hidden)
    got = expected.clone()
    reference.experts(slab, layer, jobs, h, expected)
    launcher.experts(slab, layer, jobs, h, got)
    assert torch.equal(got, expected)
    assert expected.abs().min() > 0  # every pair was computed


# What is quantized for the pair that is left alone is whatever lay in memory.
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_experts_that_are_elsewhere_are_left_alone():
    rng = np.random.default_rng(4)
    slab, layout = random_slab(rng, "q4_0", "q4_0", "q4_0", 1, 64, 32)
    layer = ExpertWeights(layout, "silu", 0.0, None)
    begins, starts = np.array([0, -1], np.int64), np.array([0, 1, 2], np.int32)
    jobs = Jobs(begins, np.arange(2, dtype=np.int32), starts, np.array([0, 1], np.int32), 2)
    out = torch.full((2, 64), 7.0)
    launcher.experts(slab, layer, jobs, reference.quantize(random_rows(rng, 1, 64)), out)
    assert (out[1] == 7).all() and (out[0] != 7).all()


def test_linear_heads():
    """Matrices of a latent layer's heads: each times its own rows."""
    rng = np.random.default_rng(6)
    num_heads, shape = 3, (48, 64)
    heads = [random_matrix(rng, "q8_0", shape) for _ in range(num_heads)]
    data = torch.cat([head.data for head in heads])
    matrix = Quantized(data, "q8_0", (num_heads * shape[0], shape[1]))
    a = reference.quantize(random_rows(rng, 2 * num_heads, shape[1]))
    got = launcher.linear_heads(a, matrix, num_heads)
    assert torch.equal(got, reference.linear_heads(a, matrix, num_heads))
    of_one = reference.quantize(torch.zeros(2, 64))._replace(
        values=a.values[1::3], factors=a.factors[:, 1::3]
    )
    assert torch.equal(got[1::3], reference.linear(of_one, heads[1]))


def test_combine():
    rng = np.random.default_rng(5)
    x = random_rows(rng, 3, 96)
    out, weights = random_rows(rng, 6, 96), torch.from_numpy(rng.random((3, 2), np.float32))
    expected, got = x.clone(), x.clone()
    reference.combine(expected, out, weights)
    launcher.combine(got, out, weights)
    assert torch.equal(got, expected)
