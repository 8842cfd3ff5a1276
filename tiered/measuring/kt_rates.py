"""kt-kernel's experts, by its llamafile backend: the one for GGUF's formats and any processor.

Runs as a process of its own (`python -m tiered.measuring.kt_rates THREADS`), like `ggml_rates`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from importlib import import_module
from typing import Any

import numpy as np

from cpu_kernels.formats import FORMATS
from tiered.checkpoints.gguf_header import TENSOR_TYPES
from tiered.measuring.timing import NUM_ROWS, best_seconds, rate

MEASURED = {"q4_0", "q4_k", "q6_k", "q8_0"}  # more are listed than there are kernels for


class Experts:
    """Experts of one format, on each of which each of `num_rows` rows is computed.

    `weights` are gate's and up's [num_experts, size, hidden_size] and down's [num_experts,
    hidden_size, size], as bytes; `x` and `y` are float32 [num_rows, hidden_size].
    """

    def __init__(
        self, library: Any, pool: Any, number: int, count: int, shape: tuple[int, int],
        weights: tuple[np.ndarray, np.ndarray, np.ndarray], x: np.ndarray,
    ) -> None:  # fmt: skip
        self.pool, self.count, self.x, self.y = pool, count, x, np.empty_like(x)
        self.experts = np.tile(np.arange(count, dtype=np.int64), (len(x), 1))
        self.routing_weights = np.full((len(x), count), 1 / count, np.float32)
        self.num_rows = np.array([len(x)], np.int32)
        self.on_gpu = np.zeros(count, np.uint8)
        self.weights = weights
        config = library.moe.MOEConfig(count, count, shape[1], shape[0], self.on_gpu.ctypes.data)
        config.pool, config.layer_idx = pool.backend_, 0
        config.m_block, config.group_min_len = 32, 10  # as its own wrapper has them
        config.max_len = config.group_max_len = max(len(x), 16)
        config.gate_proj, config.up_proj, config.down_proj = (w.ctypes.data for w in weights)
        config.gate_type = config.up_type = config.down_type = library.kvcache.ggml_type(number)
        config.hidden_type = library.kvcache.ggml_type.FP32
        self.moe = library.moe.MOE(config)
        pool.submit(self.moe.load_weights_task(self.experts[0].ctypes.data))
        pool.sync()

    def run(self) -> None:
        arrays = self.experts, self.routing_weights, self.x, self.y
        addresses = [array.ctypes.data for array in arrays]
        self.pool.submit(
            self.moe.forward_task(self.num_rows.ctypes.data, self.count, *addresses, False)
        )
        self.pool.sync()


def open_pool(library: Any, threads: int) -> Any:
    config = library.WorkerPoolConfig()
    config.subpool_count, config.subpool_numa_map = 1, [0]
    config.subpool_thread_count = [threads]
    return library.CPUInfer(config)


def kt_rates(threads: int) -> Iterator[dict[str, Any]]:
    """Rates by format and shape of gate, over the weights of all three matrices: a row each."""
    from cpu_kernels.bench import DECODE_BYTES, PREFILL_BYTES, SHAPES, random_weights

    library = import_module("kt_kernel").kt_kernel_ext
    pool = open_pool(library, threads)
    for number, format in TENSOR_TYPES.items():
        for shape in SHAPES if format in MEASURED else ():
            size = shape[0] * FORMATS[format].row_bytes(shape[1])
            for num_rows in NUM_ROWS:
                nbytes = DECODE_BYTES if num_rows == 1 else PREFILL_BYTES
                count = max(1, nbytes // (3 * size))
                gate = random_weights(format, count * size)
                x = np.random.default_rng(1).standard_normal((num_rows, shape[1]), np.float32)
                weights = gate, gate, gate  # copied as they are loaded
                experts = Experts(library, pool, number, count, shape, weights, x)
                experts.run()  # warms up
                seconds = best_seconds([experts.run]) / (3 * count)
                name = f"kt-kernel {format}"
                yield rate(name, format, shape, threads, num_rows, size, seconds)


if __name__ == "__main__":
    try:
        for row in kt_rates(int(sys.argv[1])):
            print(
                "\n" + json.dumps(row), flush=True
            )  # on a line of its own: the library writes too
    except (ImportError, AttributeError, TypeError) as error:
        sys.exit(f"another version than 0.7 of it: {error}")
