"""The GPU's arithmetic: its reference against float64, and its kernels against the reference."""

import os
import subprocess
import sys
from pathlib import Path

import naive_formats
import numpy as np
import pytest

from cpu_kernels.formats import FORMATS

torch = pytest.importorskip("torch")
from gpu_backend import gating, reference, unpack  # noqa: E402
from gpu_backend.arrays import Quantized  # noqa: E402
from gpu_backend.formats import QUANTIZED, parts_of, plane_offsets  # noqa: E402

TESTS = Path(__file__).parent


def in_planes(data, format, shape):
    planes = torch.empty(data.size, dtype=torch.uint8)
    num_blocks = shape[0] * shape[1] // FORMATS[format].block_size
    reference.rearrange(torch.from_numpy(data.reshape(-1)), planes, format, num_blocks)
    return Quantized(planes, format, shape)


@pytest.mark.parametrize("format", QUANTIZED)
def test_planes_hold_every_byte_once(format):
    parts = sorted(parts_of(format))
    ends = [part.offset + part.nbytes for part in parts]
    assert [part.offset for part in parts] == [0, *ends[:-1]]
    assert ends[-1] == FORMATS[format].block_bytes
    for part, at in zip(parts_of(format), plane_offsets(format, 2), strict=True):
        assert at % min(16, part.nbytes) == 0  # wide loads are aligned, also for odd block counts


@pytest.mark.parametrize("format", QUANTIZED)
def test_unpacking_is_exact(format):
    shape = 6, 512
    data = naive_formats.random_matrix(np.random.default_rng(0), format, shape)
    expected = naive_formats.to_float64(data, format, shape)
    np.testing.assert_array_equal(unpack.dequantize(in_planes(data, format, shape)), expected)


@pytest.mark.parametrize("format", QUANTIZED)
def test_reference_against_float64(format):
    rng = np.random.default_rng(1)
    shape = 24, {32: 416, 64: 448, 128: 640, 256: 768}[FORMATS[format].block_size]
    data = naive_formats.random_matrix(rng, format, shape)
    x = rng.standard_normal((3, shape[1])).astype(np.float32)
    weights = naive_formats.to_float64(data, format, shape)
    expected = naive_formats.quantized_activations(x) @ weights.T
    got = reference.linear(reference.quantize(torch.from_numpy(x)), in_planes(data, format, shape))
    # Float32 sums of a few dozen terms: far below the quantization's own error of 1e-2.
    size = np.abs(x) @ np.abs(weights).T
    assert (np.abs(got.numpy() - expected) <= 2e-6 * size).all()


def test_silu():
    x = torch.cat([torch.linspace(-120, 120, 4001), torch.tensor([0.0, -0.0])])
    expected = x.double() / (1 + torch.exp(-x.double()))
    error = (gating.silu(x) - expected).abs()
    assert (error <= 4e-7 * expected.abs() + 1e-34).all()


def run_interpreted(*arguments):
    """tests/gpu_interpreted.py in a process of its own: see there."""
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-q", "-x", str(TESTS / "gpu_interpreted.py")]
    result = subprocess.run(
        [*command, "-p", "no:cacheprovider", *arguments],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=TESTS.parent,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-1000:]


def test_kernels_in_the_interpreter():
    run_interpreted("-k", "quantize or combine or (linear and (q4_0 or mxfp4)) or elsewhere")


@pytest.mark.slow
def test_all_kernels_in_the_interpreter():
    run_interpreted("-k", "not ((linear and q4_0) or quantize)")


class Grids:
    """In the place of a kernel: how many programs it is launched with, along each axis."""

    def __init__(self):
        self.seen = []

    def __getitem__(self, grid):
        self.seen.append(grid)
        return lambda *arguments, **options: None


def test_grids_of_long_prompts_are_what_cuda_allows(monkeypatch):
    """512 tokens of DeepSeek-V3 have 65536 heads."""
    pytest.importorskip("triton")
    from gpu_backend import launch
    from gpu_backend.arrays import Activations, Quantized

    grids = Grids()
    for name in ("quantize_kernel", "down_kernel", "combine_kernel"):
        monkeypatch.setattr(launch, name, grids)
    num_rows, launcher = 1 << 16, launch.Launcher()
    launcher.quantize(torch.zeros(num_rows, 32))
    a = Activations(torch.zeros((num_rows, 32), dtype=torch.int8), torch.zeros(4, num_rows, 1))
    matrix = Quantized(torch.zeros(128 * 16 * 18, dtype=torch.uint8), "q4_0", (128 * 16, 32))
    launcher.linear_heads(a, matrix, 128)
    launcher.combine(torch.zeros(num_rows, 32), torch.zeros(num_rows, 32), torch.ones(num_rows, 1))
    assert [grid[0] for grid in grids.seen] == [num_rows] * 3
    assert all(grid[1] < 1 << 16 for grid in grids.seen)
