"""Calibrate: the costs of one model's operations on this machine, each measured by itself.

They are measured in an engine that generates another text meanwhile, by turns, so that both see
the same machine. What a forecast then adds is how often experts are missed, and how reading,
waiting and computing follow on each other.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from statistics import fmean
from time import perf_counter
from typing import NamedTuple

import numpy as np

from tiered.checkpoints.damage import find_damage
from tiered.engine import Engine
from tiered.generation import Generation
from tiered.governor import Governors
from tiered.measuring.chosen_experts import (
    ChosenExperts,
    Kind,
    LapClock,
    LayerTimes,
    Usage,
)
from tiered.model import Decoder
from tiered.planning.hardware import GB, Disk, Hardware, Host
from tiered.planning.sizes import ModelSizes
from tiered.text.sampling import Sampler, SamplingParams


class Sample(NamedTuple):
    """Some tokens of which each operation was timed."""

    seconds: float
    parts: list[dict[str, float]]  # of these, by token
    layers: list[tuple[Kind, LayerTimes]]  # of all tokens


Measure = Callable[[int], Sample]


class _Layer(NamedTuple):
    """Seconds of a layer's experts."""

    lookup: float  # before any is computed, though all are there
    wake: float  # of each group, however small ...
    resume: float  # ... and what it takes more after waiting for it
    per_blob: float
    rest: float  # after them; of all layers together


class Calibration:
    """What one model's operations cost on this machine with one budget.

    Costs are averages, since a token's time is the sum of its operations', and are told as
    efficiencies, relative to the bandwidth of plain reads; above 1 for what stays in caches.
    """

    def __init__(self, model: ModelSizes, context: int, usage: Usage) -> None:
        """`context`: tokens of an average text; `usage`: what is expected of it."""
        self.model, self.context, self.usage = model, context, usage
        self._bandwidth = 0.0  # of plain reads: the unit of efficiencies
        self._threads = self._ram = 0

    @contextmanager
    def beside(self, engine: Engine, prompt: Sequence[int]) -> Iterator[Measure]:
        """Within, a call measures so many tokens of a text of their own, after `prompt`.

        The engine must have room for a second text. Where it holds all experts for good, its own
        decoder is timed, whole; else the same with experts from another tier, layer by layer.
        """
        from cpu_kernels.bandwidth import read_bandwidth

        self._threads, self._ram = engine.backend.num_threads, engine.plan.limit
        if not self._bandwidth:
            self._bandwidth = read_bandwidth(self._threads)
        with ExitStack() as stack:
            clock = LapClock(engine.backend.chained_seconds)
            source, chosen = engine.source, None
            if not engine.plan.mapped:
                chosen = ChosenExperts(engine, self.usage, clock, stack)
            own = engine.decoder
            decoder = Decoder(
                engine.config, engine.backend, own.embedding, own.layers, own.output,
                chosen or source,
            )  # fmt: skip
            decoder.clock = clock
            generation = Generation(
                decoder, engine.kv, Governors([]), engine.choices,
                engine.generation.pass_tokens,
                partial(find_damage, engine.checkpoint),
            )  # fmt: skip
            text = engine.kv.open()
            stack.callback(engine.kv.close, text)
            logits = generation.begin(text, prompt)
            sampler = Sampler(SamplingParams(), list(prompt))
            tokens = generation.tokens(text, logits, sampler, engine.context - len(prompt))
            next(tokens)  # known from the prompt already
            clock.take()

            def measure(count: int) -> Sample:
                parts, begin = [], perf_counter()
                layers: list[tuple[Kind, LayerTimes]] = []
                if chosen is not None:
                    chosen.prepare(count)
                for _ in range(count):
                    start = perf_counter()
                    next(tokens)
                    seconds = perf_counter() - start
                    laps, times = clock.take()
                    parts.append(_by_part(laps, seconds))
                    layers += times
                return Sample(perf_counter() - begin, parts, layers)

            yield measure

    def hardware(self, samples: Sequence[Sample]) -> Hardware:
        """This machine as this model sees it with this budget."""
        model, bandwidth = self.model, self._bandwidth
        tokens = [parts for sample in samples for parts in sample.parts]
        parts = {name: fmean(of[name] for of in tokens) for name in tokens[0]}
        dense_rate = (sum(model.attention) + model.kv(self.context)) / parts["attention"]
        blob = sum(model.experts) / sum(map(bool, model.experts))
        shared = sum(model.shared) / dense_rate  # seconds
        layers = [layer for sample in samples for layer in sample.layers]
        if layers:
            layer, disk = self._tiered(blob, LayersByKind(layers))
        else:  # nobody asks what of it is fixed
            seconds = max(0.1 * parts["experts"], parts["experts"] - shared)
            per_blob = seconds / sum(map(bool, model.experts)) / model.top_k
            layer, disk = _Layer(0.0, 0.0, 0.0, per_blob, 0.0), Disk(1.0)
        host = Host(
            ram=self._ram, bandwidth=bandwidth / GB, cores=self._threads, compute=1.0,
            efficiency=blob / layer.per_blob / bandwidth,
            attention_efficiency=dense_rate / bandwidth,
            head_efficiency=model.head / parts["head"] / bandwidth,
            wake=layer.wake * 1e6,
            resume=layer.resume * 1e6,
            lookup=layer.lookup * 1e6,
            overhead=(parts["router"] + max(0.0, layer.rest - shared)) / model.num_layers * 1e6,
        )  # fmt: skip
        return Hardware("this machine", f"this machine, {self._threads} threads", host, disk)

    def _tiered(self, blob: float, layers: LayersByKind) -> tuple[_Layer, Disk]:
        """What a layer's experts cost, and their reads."""
        k = self.model.top_k
        all_, one = layers.average(Kind(k, 0)), layers.average(Kind(k - 1, 1))
        per_blob = all_.first / k
        if k > 1:
            few = layers.average(Kind(1, 0))
            per_blob = max((all_.first - few.first) / (k - 1), 0.5 * per_blob)
        wake = max(0.0, all_.first - k * per_blob)
        reading = 1.0
        if k > 1:
            reading = min(1.0, (wake + (k - 1) * per_blob) / one.first)
        first = one.arrival - all_.lookup  # until one that is missing was there
        num_reads = max(kind.misses for kind in layers.kinds)
        per_read = 0.05 * first
        if num_reads > 1:
            last = layers.average(Kind(k - num_reads, num_reads)).arrival - all_.lookup
            per_read = min(max((last - first) / (num_reads - 1), per_read), first)
        disk = Disk(blob / per_read / GB, (first - per_read) * 1e6, 1.0, reading)
        rest = all_.rest * sum(map(bool, self.model.experts))
        resume = max(0.0, one.last - wake - per_blob)
        return _Layer(all_.lookup, wake, resume, per_blob, rest), disk


class LayersByKind:
    """What was timed of each kind of layer."""

    def __init__(self, layers: Sequence[tuple[Kind, LayerTimes]]) -> None:
        self._times: defaultdict[Kind, list[LayerTimes]] = defaultdict(list)
        for kind, times in layers:
            self._times[kind].append(times)

    @property
    def kinds(self) -> list[Kind]:
        return list(self._times)

    def average(self, kind: Kind) -> LayerTimes:
        return LayerTimes(*np.mean(self._times[kind], axis=0).tolist())


def _by_part(laps: Sequence[tuple[str, float]], seconds: float) -> dict[str, float]:
    """A token's seconds; what no lap has, as sampling, is the head's."""
    parts = dict.fromkeys(("attention", "router", "experts", "waiting", "head"), 0.0)
    for part, spent in laps:
        parts[part] += spent
    parts["head"] += seconds - sum(parts.values())
    return parts
