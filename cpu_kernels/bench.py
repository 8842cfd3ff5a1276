"""Speed of single kernels: GB/s of weights in decode, GOPS in prefill, beside what memory gives."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from cpu_kernels.bandwidth import read_bandwidth
from cpu_kernels.formats import FORMATS
from cpu_kernels.isa import choose
from cpu_kernels.linear import Matrix, multiply, prepare_activations, prepared_bytes
from cpu_kernels.memory import address_of, aligned_bytes, record, word
from cpu_kernels.team import Team, barrier, op, restart_tasks

SHAPES = (14336, 4096), (768, 2048)  # of one projection: Mixtral 8x7B's, Qwen3-30B-A3B's
DECODE_BYTES = 384 << 20  # cycled over, so that caches do not help
PREFILL_ROWS = 128, 512
PREFILL_BYTES = 8 << 20  # or one matrix, if that is more
REPEATS = 3


@op
def _products(arguments, thread, num_threads, team):
    """records of matrices, how many, x, rows of x, columns, prepared, y, features"""
    x, n, k, prepared = (
        word(arguments, 2),
        word(arguments, 3),
        word(arguments, 4),
        word(arguments, 5),
    )
    prepare_activations(x, k, n, k, prepared, thread, num_threads)
    barrier(team)
    for i in range(word(arguments, 1)):
        matrix = word(word(arguments, 0), i)
        multiply(matrix, prepared, n, word(arguments, 6), word(arguments, 7), team, i % 2)
        if thread == 0:
            restart_tasks(team, (i + 1) % 2)
        barrier(team)


def random_weights(format: str, nbytes: int) -> np.ndarray:
    """Bytes that are valid blocks: every float16 in them is finite, every float is normal."""
    rng = np.random.default_rng(0)
    values = rng.standard_normal(min(nbytes, 1 << 22), np.float32)
    if format == "f32":
        block = values.view(np.uint8)
    elif format == "f16":
        block = values.astype(np.float16).view(np.uint8)
    elif format == "bf16":
        block = (values.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
    else:
        low = 100 if format == "mxfp4" else 0  # its scales are exponents: below, results underflow
        block = rng.integers(low, low + 60, 1 << 22, dtype=np.uint8)
    data = aligned_bytes(nbytes)
    data[:] = np.resize(block, nbytes)
    return data


def product_seconds(
    team: Team, format: str, shape: tuple[int, int], num_rows: int, nbytes: int, isa: str = "auto"
) -> tuple[float, int]:
    """Best time of multiplying matrices of `shape` that fill `nbytes` (at least one) with
    `num_rows` rows, and how many matrices that were."""
    features, columns = shape
    size = features * FORMATS[format].row_bytes(columns)
    count = max(1, nbytes // size)
    data = random_weights(format, count * size)
    chosen = choose(isa)
    matrices = [
        Matrix(data[i * size : (i + 1) * size], format, shape, chosen) for i in range(count)
    ]
    addresses = np.array([matrix.address for matrix in matrices], np.int64)
    x = np.random.default_rng(1).standard_normal((num_rows, columns), np.float32)
    y = np.empty((num_rows, features), np.float32)
    prepared = aligned_bytes(prepared_bytes(num_rows, columns))
    words = record(
        address_of(addresses), count, address_of(x), num_rows, columns, address_of(prepared),
        address_of(y), features,
    )  # fmt: skip
    best = float("inf")
    for _ in range(REPEATS + 1):  # the first one also compiles, and warms up
        start = time.perf_counter()
        team.run(_products.address, address_of(words))
        best = min(best, time.perf_counter() - start)
    return best, count


def kernel_rates(
    formats: list[str],
    threads: list[int],
    progress: Callable[[str, int, int], None],
) -> Iterator[dict[str, Any]]:
    """One measurement after the other: format, shape, threads, rows; GB/s or GOPS."""
    total = len(formats) * len(SHAPES) * len(threads)
    done = 0
    for num_threads in threads:
        bandwidth = read_bandwidth(num_threads)
        with Team(num_threads) as team:
            for format in formats:
                for shape in SHAPES:
                    progress(f"{format} {shape[0]}x{shape[1]}", done, total)
                    done += 1
                    common = {
                        "format": format, "shape": list(shape), "threads": num_threads,
                        "row_bytes": FORMATS[format].row_bytes(shape[1]),
                    }  # fmt: skip
                    seconds, count = product_seconds(team, format, shape, 1, DECODE_BYTES)
                    nbytes = count * shape[0] * FORMATS[format].row_bytes(shape[1])
                    yield {
                        **common, "rows": 1, "gb_s": nbytes / seconds / 1e9,
                        "of_bandwidth": nbytes / seconds / bandwidth,
                        "bandwidth_gb_s": bandwidth / 1e9,
                    }  # fmt: skip
                    for num_rows in PREFILL_ROWS:
                        seconds, count = product_seconds(
                            team, format, shape, num_rows, PREFILL_BYTES
                        )
                        operations = 2.0 * count * num_rows * shape[0] * shape[1]
                        yield {**common, "rows": num_rows, "gops": operations / seconds / 1e9}
