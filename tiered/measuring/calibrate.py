"""Calibrate: the costs of one model's operations on this machine, each measured by itself.

An open engine's own operations run on random tokens and random experts. What a forecast then adds
is how often experts are missed, what the disk does, and how all of it overlaps.
"""

from __future__ import annotations

from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle
from mmap import mmap
from random import Random
from time import perf_counter
from typing import NamedTuple

import numpy as np

from tiered import policies
from tiered.engine import Engine
from tiered.experts import ExpertKey, Routing, aligned, group_by_expert
from tiered.kv_cache import Sequence as Text
from tiered.planning.hardware import GB, Disk, Hardware, Host
from tiered.planning.sizes import ModelSizes
from tiered.reader import BLOCK
from tiered.slots import RamMemory
from tiered.source import TieredExperts
from tiered.store import ExpertStore
from tiered.tier import Tier

REPEATS = 24  # tokens timed for each number of experts
READS = 48  # experts read to measure the disk
FETCHES = 24  # by a tier, of each kind


class Parts(defaultdict[str, list[float]]):
    """Seconds of each part, by name, of many tokens."""

    def __init__(self) -> None:
        super().__init__(list)


class Calibration:
    """What one model's operations cost on this machine, from as many measurements as there were.

    Other programs can only make something slower, so the quicker quarter of all counts. Costs are
    told as efficiencies, relative to the bandwidth of plain reads; above 1 for what stays in
    caches.
    """

    def __init__(self, model: ModelSizes, context: int) -> None:
        self.model, self.context = model, context
        self._few, self._all = Parts(), Parts()
        self._fetches: list[TierTimes] = []
        self._mapped: list[float] = []  # seconds of a fetch without a tier
        self._disk_shares: list[float] = []  # of its speed, while tokens are computed
        self._reading: list[float] = []  # seconds of tokens while the disk is read
        self._bandwidth = 0.0  # of plain reads: the unit of efficiencies
        self._threads = self._ram = 0

    def measure(self, engine: Engine) -> None:
        """Once more, after `context` tokens. The engine must hold all experts."""
        from cpu_kernels.bandwidth import read_bandwidth

        self._threads, self._ram = engine.backend.num_threads, engine.plan.limit
        if not self._bandwidth:
            self._bandwidth = read_bandwidth(self._threads)
        touch_all(engine)
        text = engine.kv.open()
        try:
            size = engine.config.vocab_size
            prompt = [Random(i).randrange(size) for i in range(self.context)]
            batch = engine.kv.batch([(text, prompt)])
            engine.decoder.forward(batch, engine.kv.pages, np.array([0]))
            _add_parts(engine, text, 1, self._few)
            _add_parts(engine, text, engine.config.top_k, self._all)
            self._fetches.append(tier_times(engine))
            self._mapped.append(mapped_seconds(engine))
            alone = _alone(engine)
            rate, seconds = _competing(engine, text)
            self._disk_shares.append(rate / alone)
            self._reading += seconds
        finally:
            engine.kv.close(text)

    def hardware(self, mapped: bool) -> Hardware:
        """This machine as this model sees it; `mapped`: without a tier."""
        model, bandwidth = self.model, self._bandwidth
        few, all_ = (
            {name: float(np.percentile(times, 25)) for name, times in parts.items()}
            for parts in (self._few, self._all)
        )
        blobs = sum(model.experts)
        top_k, sparse = model.top_k, sum(map(bool, model.experts))
        per_byte = max(0.5 * all_["experts"] / (top_k * blobs), 1e-15)
        if top_k > 1:
            per_byte = max(per_byte, (all_["experts"] - few["experts"]) / ((top_k - 1) * blobs))
        fixed = max(0.0, all_["experts"] - per_byte * top_k * blobs)  # combining, Python
        dense = sum(model.attention) + sum(model.shared) + model.kv(self.context)
        fetch = TierTimes(*np.percentile(self._fetches, 25, axis=0).tolist())
        nbytes = blobs / sparse
        per_read = max((fetch.all_ - fetch.one) / max(1, top_k - 1), 0.05 * fetch.one)
        disk = Disk(
            nbytes / per_read / GB,
            max(0.0, fetch.one - per_read) * 1e6,
            min(1.0, max(0.05, float(np.median(self._disk_shares)))),
            min(1.0, sum(all_.values()) / float(np.percentile(self._reading, 25))),
        )
        tier = 0.0 if mapped else max(0.0, fetch.hit - float(np.percentile(self._mapped, 25)))
        host = Host(
            ram=self._ram, bandwidth=bandwidth / GB, cores=self._threads, compute=1.0,
            efficiency=1 / per_byte / bandwidth,
            attention_efficiency=dense / (all_["attention"] + all_["shared"]) / bandwidth,
            head_efficiency=model.head / all_["head"] / bandwidth,
            wake=fixed / sparse * 1e6,
            overhead=(all_["router"] / model.num_layers + tier) * 1e6,
        )  # fmt: skip
        return Hardware("this machine", f"this machine, {self._threads} threads", host, disk)


def touch_all(engine: Engine) -> None:
    """Bring all experts into memory, so that nothing is read while operations are timed."""
    source = engine.source
    assert source is not None
    for layer in engine.config.sparse_layers:
        for _, addresses in source.fetch(layer, np.arange(engine.config.num_experts)):
            del addresses
    if engine.plan.mapped:
        for tensor in engine.checkpoint.tensors.values():
            engine.checkpoint.view(tensor)[::4096].max(initial=0)


def _add_parts(engine: Engine, text: Text, count: int, times: Parts) -> None:
    """Seconds of tokens' parts, with `count` random experts in each layer."""
    random = np.random.default_rng(count)
    length = len(text.tokens)
    for _ in range(REPEATS):
        for name, seconds in _token(engine, text, count, random).items():
            times[name].append(seconds)
        engine.kv.truncate(text, length)


def _token(engine: Engine, text: Text, count: int, random: np.random.Generator) -> dict[str, float]:
    """What Decoder.forward does, with experts that the router did not choose."""
    b, decoder, config = engine.backend, engine.decoder, engine.config
    batch = engine.kv.batch([(text, [int(random.integers(config.vocab_size))])])
    spent = dict.fromkeys(("attention", "router", "experts", "shared", "head"), 0.0)
    last = perf_counter()

    def lap(part: str) -> None:
        nonlocal last
        now = perf_counter()
        spent[part] += now - last
        last = now

    x = b.embed(decoder.embedding, batch.tokens)
    for index, layer in enumerate(decoder.layers):
        b.attention(x, layer.attention, engine.kv.pages, index, batch)
        lap("attention")
        if layer.experts is None:
            b.feed_forward(x, None, layer.feed_forward)
            lap("shared")
            continue
        h, routing = b.route(x, layer.router)
        lap("router")
        chosen = random.permutation(config.num_experts)[:count].astype(np.int32)
        routing = Routing(chosen[None], routing.weights[:, :count])
        last = perf_counter()  # choosing is not part of it
        jobs = group_by_expert(routing)
        out = b.pair_outputs(routing.experts.size)
        for ready, addresses in decoder.source.fetch(index, jobs.experts):  # type: ignore[union-attr]
            b.experts(h, layer.experts, addresses, jobs.take(ready), out)
        b.combine(x, out, np.ascontiguousarray(routing.weights))
        lap("experts")
        if layer.shared is not None:
            b.feed_forward(x, h, layer.shared)
            lap("shared")
    b.head(x, np.array([0]), decoder.output)
    lap("head")
    return spent


class Reads:
    """Random experts, read as a tier reads them: by so many threads at once."""

    def __init__(self, store: ExpertStore, layers: list[int], readers: int) -> None:
        random, config = Random(0), store.checkpoint.config
        self.keys = [
            ExpertKey(random.choice(layers), random.randrange(config.num_experts))
            for _ in range(READS)
        ]
        self.store, self.readers = store, readers
        room = aligned(max(store.blob_bytes), BLOCK) + BLOCK
        self.slots = [np.frombuffer(mmap(-1, room), np.uint8) for _ in range(readers)]
        self.done = [0] * readers  # bytes
        self.stopped = False

    def run(self, worker: int, repeat: bool = False) -> None:
        for key in cycle(self.keys[worker :: self.readers]):
            if self.stopped:
                return
            self.store.read_into(key, self.slots[worker])
            self.done[worker] += self.store.layouts(key.layer).layout(key.expert).nbytes
            if not repeat and key is self.keys[worker :: self.readers][-1]:
                return


def _reads(engine: Engine) -> Reads:
    assert engine.store is not None
    return Reads(engine.store, engine.config.sparse_layers, engine.choices.readers)


class TierTimes(NamedTuple):
    """Seconds of a layer's fetch from a tier: of what is there, of one expert that is not, and of
    `top_k` that are not."""

    hit: float
    one: float
    all_: float


def tier_times(engine: Engine) -> TierTimes:
    """Measured with a tier that has room for one fetch only."""
    store, config = engine.store, engine.config
    assert store is not None
    below = engine.blocks or store
    count = config.top_k
    space = below.space(count * max(below.blob_bytes))
    random = np.random.default_rng(0)
    policy = policies.create("lru", space)
    with Tier(RamMemory(space), below, policy, engine.choices.readers) as tier:
        source = TieredExperts(tier, below.offsets)

        def seconds(experts: np.ndarray, layer: int) -> float:
            start = perf_counter()
            for _ in source.fetch(layer, experts):
                pass
            return perf_counter() - start

        hits, ones, alls = [], [], []
        for index in range(FETCHES):
            layer = config.sparse_layers[index % len(config.sparse_layers)]
            experts = random.permutation(config.num_experts).astype(np.int32)
            alls.append(seconds(experts[:count], layer))
            hits.append(seconds(experts[:count], layer))
            ones.append(seconds(experts[count : count + 1], layer))
    return TierTimes(*(float(np.percentile(times, 25)) for times in (hits, ones, alls)))


def mapped_seconds(engine: Engine) -> float:
    """Of the fetch of a layer from an engine that has all of it."""
    experts = np.arange(engine.config.top_k, dtype=np.int32)
    times = []
    for layer in engine.config.sparse_layers:
        start = perf_counter()
        for _ in engine.source.fetch(layer, experts):  # type: ignore[union-attr]
            pass
        times.append(perf_counter() - start)
    return float(np.percentile(times, 25))


def _competing(engine: Engine, text: Text) -> tuple[float, list[float]]:
    """Bytes per second of readers while this model's tokens are computed, and the seconds of each
    of these tokens."""
    reads, length = _reads(engine), len(text.tokens)
    random = np.random.default_rng(0)
    seconds = []
    with ThreadPoolExecutor(reads.readers) as pool:
        futures = [pool.submit(reads.run, worker, True) for worker in range(reads.readers)]
        start = perf_counter()
        try:
            for _ in range(REPEATS // 2):
                seconds.append(sum(_token(engine, text, engine.config.top_k, random).values()))
                engine.kv.truncate(text, length)
        finally:
            rate = sum(reads.done) / (perf_counter() - start)
            reads.stopped = True
        for future in futures:
            future.result()
    return rate, seconds


def _alone(engine: Engine) -> float:
    """Bytes per second of readers while nothing is computed."""
    reads = _reads(engine)
    start = perf_counter()
    with ThreadPoolExecutor(reads.readers) as pool:
        for future in [pool.submit(reads.run, worker) for worker in range(reads.readers)]:
            future.result()
    return sum(reads.done) / (perf_counter() - start)
