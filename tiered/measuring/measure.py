"""Measure: how fast this machine is, for forecasts about it. Takes some seconds.

What is measured is what a forecast multiplies with: memory reads of all threads, what the expert
kernels reach of them on experts of a given layout, prompt arithmetic, and the disk.
"""

from __future__ import annotations

import os
import platform
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from mmap import mmap
from pathlib import Path
from random import Random
from time import perf_counter

import numpy as np

from tiered.backend import Backend, RouterWeights, default_threads, open_cpu
from tiered.config import EngineConfig, ModelConfig
from tiered.experts import ExpertJobs, ExpertLayout, Routing, group_by_expert
from tiered.memory import default_limit
from tiered.planning.hardware import GB, Disk, Hardware, Host
from tiered.reader import BLOCK, FileReader
from tiered.user_cache import user_cache

SECONDS = 1.5  # for each measurement
LARGER_THAN_CACHES = 256 << 20  # bytes
READERS = 4  # threads, as an engine has by default
Progress = Callable[[str], None]


def measure_machine(
    layout: ExpertLayout,
    hidden_size: int,
    expert_size: int,
    top_k: int,
    path: Path | None = None,
    threads: int | None = None,
    progress: Progress = lambda text: None,
) -> Hardware:
    """This machine without a GPU, measured with experts of this layout.

    `path` is a file whose disk is measured; default: one in the folder for temporary files.
    """
    from cpu_kernels.bandwidth import read_bandwidth

    threads = threads or default_threads()
    progress("memory")
    bandwidth = read_bandwidth(threads) / GB
    progress("expert kernels")
    with expert_bench(layout, hidden_size, expert_size, threads) as bench:
        wake, per_byte = bench.decode(top_k)
        compute = bench.prefill(top_k)
    progress("disk")
    host = Host(
        ram=default_limit(), bandwidth=bandwidth, cores=threads, compute=compute / GB,
        efficiency=min(1.0, 1 / per_byte / GB / bandwidth), wake=wake * 1e6,
    )  # fmt: skip
    host = replace(host, attention_efficiency=host.efficiency)
    disk = measure_disk(path, layout.nbytes)
    return Hardware("this machine", f"{platform.node()}, {threads} threads", host, disk)


class ExpertBench:
    """Random experts, enough of them that caches do not help, and a backend to run them."""

    def __init__(self, backend: Backend, layout: ExpertLayout, hidden: int, size: int) -> None:
        self.layout, self.backend = layout, backend
        self.num_experts = max(8, min(512, LARGER_THAN_CACHES // layout.nbytes))
        config = ModelConfig(
            "bench", num_layers=1, hidden_size=hidden, vocab_size=32, context_length=512,
            num_heads=1, num_kv_heads=1, head_dim=64, norm_eps=1e-6,
            num_experts=self.num_experts, top_k=min(8, self.num_experts), expert_size=size,
        )  # fmt: skip
        rng = np.random.default_rng(0)
        floats = rng.standard_normal((self.num_experts, hidden), np.float32)
        self._table = backend.matrix(floats.view(np.uint8).reshape(-1), "f32", floats.shape)
        self._router = backend.router_layer(
            RouterWeights(np.ones(hidden, np.float32), self._table), config
        )
        self._layer = backend.expert_layer(layout, config)
        self._blobs = np.zeros((self.num_experts, layout.nbytes + 64), np.uint8)
        base = self._blobs.ctypes.data
        stride = self._blobs.strides[0]
        starts = base + stride * np.arange(self.num_experts, dtype=np.int64)
        padding = -starts % 64
        blob = random_blob(layout)
        for row, first in zip(self._blobs, padding, strict=True):
            row[first : first + layout.nbytes] = blob
        self._addresses = (starts + padding)[:, None] + layout.offsets  # int64 [num_experts, 3]

    def decode(self, top_k: int) -> tuple[float, float]:
        """(seconds per call, seconds per byte) of a token's experts."""
        one, all_ = (self.seconds(1, count) for count in (1, max(2, min(top_k, self.num_experts))))
        count = max(2, min(top_k, self.num_experts))
        per_expert = max((all_ - one) / (count - 1), 0.2 * all_ / count)
        fixed = max(0.0, all_ - count * per_expert)
        return fixed, per_expert / self.layout.nbytes

    def prefill(self, top_k: int, num_tokens: int = 256) -> float:
        """Operations per second when many tokens share experts."""
        seconds = self.seconds(num_tokens, top_k, num_experts=min(16, self.num_experts))
        values = sum(t.shape[0] * t.shape[1] for t in self.layout)
        return 2 * num_tokens * min(top_k, self.num_experts) * values / seconds

    def seconds(self, num_tokens: int, count: int, num_experts: int | None = None) -> float:
        """Seconds of one undisturbed call for `count` random experts per token."""
        rng, b = np.random.default_rng(1), self.backend
        limit = num_experts or self.num_experts
        count = min(count, limit)
        x = b.embed(self._table, rng.integers(0, 8, num_tokens).astype(np.int32))
        h, _ = b.route(x, self._router)
        times: list[float] = []
        started = perf_counter()
        while len(times) < 5 or (perf_counter() - started < SECONDS / 2 and len(times) < 200):
            chosen = np.stack([rng.permutation(limit)[:count] for _ in range(num_tokens)])
            routing = Routing(chosen.astype(np.int32), np.ones(chosen.shape, np.float32))
            jobs: ExpertJobs = group_by_expert(routing)
            out = b.pair_outputs(chosen.size)
            start = perf_counter()
            b.experts(h, self._layer, self._addresses[jobs.experts], jobs, out)
            times.append(perf_counter() - start)
        return float(np.percentile(times[1:], 25))


def random_blob(layout: ExpertLayout) -> np.ndarray:
    """An expert with weights of usual size: uint8 [nbytes]. Those that are nearly zero, as MXFP4's
    are where all bytes are, take some processors longer."""
    from cpu_kernels.bench import random_weights

    blob = np.zeros(layout.nbytes, np.uint8)
    for tensor in layout:
        weights = random_weights(tensor.format, tensor.nbytes)
        blob[tensor.offset : tensor.offset + tensor.nbytes] = weights
    return blob


@contextmanager
def expert_bench(
    layout: ExpertLayout, hidden_size: int, expert_size: int, threads: int
) -> Iterator[ExpertBench]:
    backend = open_cpu(EngineConfig(threads=threads))
    try:
        yield ExpertBench(backend, layout, hidden_size, expert_size)
    finally:
        backend.close()


def measure_disk(path: Path | None, nbytes: int) -> Disk:
    """Random reads of `nbytes` past the page cache, by several threads, for a moment.

    `path`: a file, of the disk that is measured, or a folder there, in which one is written and
    removed; default: the user's cache folder (the one for temporary files is often in memory).
    """
    if path is not None and path.is_file():
        with suppress(OSError):
            if path.stat().st_size > 8 * nbytes:
                return _read_disk(path, nbytes)
        path = None
    with scratch_file(path or user_cache(), min(512, max(64, 16 * nbytes >> 20))) as scratch:
        return _read_disk(scratch, nbytes)


@contextmanager
def scratch_file(folder: Path, num_mib: int) -> Iterator[Path]:
    """A file of random bytes that lies on the disk, and is gone after the block."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=folder, prefix="tiered-", suffix=".bin") as scratch:
        piece = os.urandom(1 << 20)
        for _ in range(num_mib):
            scratch.write(piece)
        scratch.flush()
        os.fsync(scratch.fileno())
        yield Path(scratch.name)


def _read_disk(path: Path, nbytes: int) -> Disk:
    reader = FileReader(path)
    nbytes = max(BLOCK, min(nbytes, reader.size // 8) // BLOCK * BLOCK)
    random, limit = Random(0), (reader.size - nbytes) // BLOCK
    count = 0

    def read() -> int:
        buffer = np.frombuffer(mmap(-1, nbytes), np.uint8)
        done = 0
        while perf_counter() < deadline:
            reader.read_into(random.randrange(limit + 1) * BLOCK, buffer)
            done += 1
        return done

    try:
        buffer = np.frombuffer(mmap(-1, BLOCK), np.uint8)
        start = perf_counter()
        for _ in range(16):
            reader.read_into(random.randrange(limit + 1) * BLOCK, buffer)
        latency = (perf_counter() - start) / 16
        start = perf_counter()
        deadline = start + SECONDS
        with ThreadPoolExecutor(READERS) as pool:
            count = sum(future.result() for future in [pool.submit(read) for _ in range(READERS)])
        seconds = perf_counter() - start
    finally:
        reader.close()
    return Disk(max(1, count) * nbytes / seconds / GB, latency * 1e6)
