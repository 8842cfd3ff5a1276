"""Speed of a card's kernels: GB/s of weights for one row of activations, GOPS for a prompt's rows,
beside what the card's memory and torch's own products give."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from cpu_kernels.bench import random_weights
from cpu_kernels.formats import FORMATS
from gpu_backend.arrays import Quantized
from gpu_backend.backend import GpuBackend
from gpu_backend.device import card_name
from gpu_backend.formats import QUANTIZED
from gpu_backend.graphs import CudaRecorder, Tensors
from gpu_backend.tuning import Tuning

SHAPES = (14336, 4096), (4096, 14336), (768, 2048)  # of Mixtral 8x7B's and Qwen3-30B-A3B's
DECODE_BYTES = 1 << 30  # cycled over, so that caches do not help
PREFILL_BYTES = 64 << 20
PEAK_SIZE = 4096  # rows and columns of the float16 matrices whose product is the peak
REPEATS = 5

Progress = Callable[[str, int, int], None]


def kernel_report(
    device: str,
    tuning: Tuning | None,
    progress: Progress,
    *,
    formats: tuple[str, ...] = QUANTIZED,
    shapes: tuple[tuple[int, int], ...] = SHAPES,
    prefill_rows: tuple[int, ...] = (128, 512),
    decode_bytes: int = DECODE_BYTES,
    prefill_bytes: int = PREFILL_BYTES,
    peak_size: int = PEAK_SIZE,
) -> dict[str, Any]:
    """Rates of `formats` on "cuda:0", or on torch's "cpu". RuntimeError: there is no such device.

    The peak is that of torch's float16 products: of int8 a card may reach twice as much.
    """
    backend = GpuBackend(device, tuning=tuning)
    bandwidth, peak = _bandwidth(backend, decode_bytes), _peak(backend, peak_size)
    rows, total = [], len(formats) * len(shapes)
    for number, format in enumerate(formats):
        for place, shape in enumerate(shapes):
            progress(f"{format} {shape[0]}x{shape[1]}", number * len(shapes) + place, total)
            row_bytes = FORMATS[format].row_bytes(shape[1])
            common = {
                "format": format, "shape": list(shape), "device": device, "row_bytes": row_bytes,
            }  # fmt: skip
            seconds = _product_seconds(backend, format, shape, 1, decode_bytes)
            rate = shape[0] * row_bytes / seconds
            rows.append({
                **common, "rows": 1, "gb_s": rate / 1e9, "of_bandwidth": rate / bandwidth,
                "bandwidth_gb_s": bandwidth / 1e9,
            })  # fmt: skip
            for num_rows in prefill_rows:
                seconds = _product_seconds(backend, format, shape, num_rows, prefill_bytes)
                rate = 2.0 * num_rows * shape[0] * shape[1] / seconds
                rows.append({
                    **common, "rows": num_rows, "gops": rate / 1e9, "peak_gops": peak / 1e9,
                    "of_peak": rate / peak,
                })  # fmt: skip
    backend.close()
    return {"card": card_name(device), "kernels": rows}


def _product_seconds(
    backend: GpuBackend, format: str, shape: tuple[int, int], num_rows: int, nbytes: int
) -> float:
    """For one matrix of those that fill `nbytes` (at least one)."""
    size = shape[0] * FORMATS[format].row_bytes(shape[1])
    device, arithmetic = backend.device.torch_device, backend.arithmetic
    blocks = torch.from_numpy(random_weights(format, size)).to(device)
    planes = torch.empty_like(blocks)
    arithmetic.rearrange(blocks, planes, format, shape[0] * shape[1] // FORMATS[format].block_size)
    matrices = [Quantized(planes.clone(), format, shape) for _ in range(max(1, nbytes // size))]
    a = arithmetic.quantize(torch.randn(num_rows, shape[1]).to(device))

    def products() -> Tensors:
        return tuple(arithmetic.linear(a, matrix) for matrix in matrices)

    return _seconds(backend, products) / len(matrices)


def _bandwidth(backend: GpuBackend, nbytes: int) -> float:
    """Bytes per second of memory that is read."""
    data = torch.ones(nbytes // 4, device=backend.device.torch_device)
    return nbytes / _seconds(backend, lambda: (data.sum(),))


def _peak(backend: GpuBackend, size: int) -> float:
    """Operations per second of torch's products of float16 matrices."""
    a = torch.ones(size, size, dtype=torch.float16, device=backend.device.torch_device)
    return 2.0 * size**3 / _seconds(backend, lambda: (a @ a,))


def _seconds(backend: GpuBackend, work: Callable[[], Tensors]) -> float:
    """Best of some runs. On a card as a graph: launching from Python takes longer than the work."""
    work()  # compiled now
    device = backend.device
    if device.is_cuda:
        _, replay = CudaRecorder(device.torch_device)(work)
        return min(device.seconds(replay) for _ in range(REPEATS))
    return min(device.seconds(work) for _ in range(REPEATS))
