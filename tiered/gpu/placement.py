"""Placement: on a machine with a GPU, each expert of a layer runs where its blob lies.

Devices are data: `[cpu]` has one source of experts, whose addresses are in RAM; `[gpu, cpu]` has
`PlacedExperts`, which hands out slots of the GPU's memory and addresses in RAM in an order that
keeps both busy. Several GPUs have one each, for the experts of their layers. No other part of the
control asks where an expert runs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from typing import Any

import numpy as np

from tiered.experts import ExpertKey
from tiered.governor import Allowance, Always
from tiered.gpu.busy import Busy, Channel
from tiered.gpu.splits import Split
from tiered.model import ExpertSource
from tiered.planning.admission import Admission
from tiered.planning.costs import Costs, Miss
from tiered.planning.gpu_tier import make_way, staying_for
from tiered.store import ExpertStore
from tiered.tier import Tier

Group = tuple[Any, np.ndarray]  # positions in a layer's experts; addresses int64 [count, 3]


class PlacedExperts:
    """Where a decoder's experts come from, on a GPU with a CPU beside it.

    `vram` is the tier of the GPU's memory; `below` the CPU's source (a RAM tier, or the memory
    map), which computes an expert in pieces of at most `few_rows` rows of activations, because for
    those its kernels give the GPU's bits. So where an expert runs is a question of costs alone: the
    fewer rows a prompt has for it, the sooner it is computed where it is than copied. `admission`:
    misses that the CPU computed are copied afterwards, if they are worth it and the link is idle;
    None: never. `split` says how many misses are copied, `prompt_split` (default: the same) those
    of a prompt. `kernels` tells bytes and seconds of what the GPU has computed since it was asked.
    """

    def __init__(
        self,
        vram: Tier,
        below: ExpertSource,
        store: ExpertStore,
        split: Split,
        costs: Costs,
        *,
        few_rows: int,
        admission: Admission | None = None,
        clock: Callable[[], float] = time.perf_counter,
        cpu: Busy | None = None,
        link: Channel | None = None,
        kernels: Callable[[], Iterable[tuple[float, float]]] = tuple,
        prompt_split: Split | None = None,
    ) -> None:
        self.vram = vram
        self.below = below
        self.split, self._prompt_split = split, prompt_split or split
        self.costs = costs
        self.few_rows = few_rows
        self.admission = admission
        self.promotion: Allowance = Always()  # whether anything is copied afterwards now
        self.hits = self.copies = self.computed_in_ram = 0  # experts, each once per layer
        self._cpu, self._link, self._kernels = cpu or Busy(clock), link, kernels
        self._layer, self._began = -1, self._cpu.clock()  # of this pass
        self._spares: Set[ExpertKey] | None = None
        self.passing: set[ExpertKey] = set()  # of a prompt: on the GPU, and about to leave it
        sparse = store.checkpoint.config.sparse_layers
        self._offsets = store.offsets
        self._nbytes = {
            layer: np.array(store.layouts(layer).blob_bytes, np.float64) for layer in sparse
        }

    def fetch(
        self, layer: int, experts: np.ndarray, starts: np.ndarray | None = None
    ) -> Iterator[Group]:
        """See ExpertSource. Without `starts` each expert has one row of activations.

        First what is resident, so that the GPU has something to do; then what the CPU computes
        meanwhile; then what has been copied meanwhile.
        """
        keys = [ExpertKey(layer, expert) for expert in experts.tolist()]
        for nbytes, seconds in self._kernels():
            self.costs.gpu.observe(nbytes, seconds)
        self._count_pass(layer)
        if self.admission is not None:
            self.admission.touch(keys)
        hits, awaited, misses = self._look_up(keys)
        copied = self._num_copied(keys, hits, awaited, misses, starts)
        if self.admission is not None:
            self.admission.copying(copied > 0)
        here = sorted([*hits, *awaited, *misses[:copied]])  # what will be wanted soonest comes last
        there = sorted(misses[copied:])
        if starts is not None and np.diff(starts).max(initial=0) > self.few_rows:
            self._count_passing(keys)
        self.hits += len(hits) + len(awaited)
        self.copies += copied
        self.computed_in_ram += len(there)
        with self.vram.fetch([keys[i] for i in here]) as groups:
            if hits:
                yield self._places(keys, here, next(groups))
            if there:
                yield from self._compute_in_ram(layer, experts, there, starts, copied > 0)
            for group in groups:
                yield self._places(keys, here, group)
        self._promote([keys[i] for i in there])

    def _count_pass(self, layer: int) -> None:
        """Layers come one after the other: one that does not come later begins the next pass."""
        if layer <= self._layer:
            self._spares = None
            self.passing.clear()
            now = self._cpu.clock()
            if self.admission is not None:
                self.admission.token_done(now - self._began)
            self._began = now
        self._layer = layer

    def _count_passing(self, keys: Sequence[ExpertKey]) -> None:
        """Of a layer of a prompt, the first experts will have left when it ends: those beyond the
        layer's share of the slots."""
        tier = self.vram.residency
        share = tier.num_slots // tier.space.num_sparse_layers
        self.passing.update(keys[: max(0, len(keys) - share)])

    def _look_up(self, keys: Sequence[ExpertKey]) -> tuple[list[int], list[int], list[int]]:
        """Positions of what is on the GPU, on its way there, and neither."""
        places: tuple[list[int], list[int], list[int]] = [], [], []
        with self.vram.lock:
            under_way = {load.key for load in self.vram.loads.values()}
            for position, key in enumerate(keys):
                kind = 2 if key not in self.vram else 1 if key in under_way else 0
                places[kind].append(position)
        return places

    def _num_copied(
        self,
        keys: Sequence[ExpertKey],
        hits: list[int],
        awaited: list[int],
        misses: list[int],
        starts: np.ndarray | None,
    ) -> int:
        """How many of the misses are copied. Sorts `misses`: those with most rows come first."""
        if not misses:
            return 0
        nbytes = self._nbytes[keys[0].layer][[key.expert for key in keys]].tolist()
        counts = _num_rows(keys, starts)
        misses.sort(key=lambda i: -counts[i])
        free = [
            Miss(nbytes[i], 0.0, self.costs.work(nbytes[i], counts[i], self.few_rows))
            for i in misses
        ]
        wait, there = sum(self.costs.link(nbytes[i]) for i in awaited), sum(nbytes[i] for i in hits)
        if max(counts) <= self.few_rows:
            chosen = self._make_way(keys, misses[: self.split.place(there, free, wait)])
        else:
            chosen = self._prompt_split.place(there, free, wait)
        fitting = chosen
        if chosen == len(misses):
            return chosen
        while fitting and not self.vram.residency.fits(
            [keys[i] for i in (*hits, *awaited, *misses[:fitting])]
        ):
            fitting -= 1
        if fitting == chosen:
            return chosen
        # The GPU alone can take more than fits, piece by piece; otherwise a piece would have to
        # wait for the CPU.
        choices = fitting, len(misses)
        return min(choices, key=lambda n: self.costs.layer_seconds(there, free, n, wait))

    def _make_way(self, keys: Sequence[ExpertKey], wanted: list[int]) -> int:
        """How many of these may be copied, so that nothing has to be read again for it."""
        ram: Tier | None = getattr(self.below, "tier", None)
        if ram is None or not wanted:
            return len(wanted)
        with self.vram.lock:
            staying = {*keys, *self.vram.pinned_keys()}
            count = make_way(
                self.vram.residency, [keys[i] for i in wanted], staying, ram.residency.resident(),
                self._find_spares,
            )  # fmt: skip
            self.vram.settle()
        return count

    def _find_spares(self) -> Set[ExpertKey]:
        """What is in RAM, too: of large models not to be asked for each layer."""
        if self._spares is None:
            ram: Any = self.below
            self._spares = self.vram.residency.resident() & ram.tier.residency.resident()
        return self._spares

    def _places(
        self, keys: Sequence[ExpertKey], here: list[int], group: list[tuple[int, Any]]
    ) -> Group:
        places = [place for _, place in group]
        ready = [here[i] for i, _ in group]
        within = self._offsets[keys[0].layer][[keys[i].expert for i in ready]]
        return ready, np.array(places, np.int64)[:, None] + within

    def _compute_in_ram(
        self,
        layer: int,
        experts: np.ndarray,
        there: list[int],
        starts: np.ndarray | None,
        copying: bool,
    ) -> Iterator[Group]:
        """The consumer computes a group before it asks for the next: that is what is timed."""
        nbytes, counts = self._nbytes[layer], _num_rows(experts, starts)
        for ready, addresses in self.below.fetch(layer, experts[there]):
            begin, copied = self._cpu.clock(), self._copying()
            with self._cpu.running():
                yield [there[i] for i in ready], addresses
            seconds = self._cpu.clock() - begin
            overlap = (self._copying() - copied) / seconds if self._link and seconds else copying
            work = [
                self.costs.work(float(nbytes[experts[there[i]]]), counts[there[i]], self.few_rows)
                for i in ready
            ]
            self.costs.observe_cpu(sum(work), seconds, min(1.0, overlap))

    def _copying(self) -> float:
        """Seconds in which copies to the GPU ran so far, also those that nobody waits for."""
        return self._link.busy() if self._link else 0.0

    def _promote(self, computed: Sequence[ExpertKey]) -> None:
        """Start copying one expert that the CPU had to compute, if nothing else is under way."""
        admission, tier = self.admission, self.vram
        if admission is None or not computed or tier.loads or not self.promotion.limit():
            return
        ram: Tier | None = getattr(self.below, "tier", None)
        in_ram = None if ram is None else ram.residency.resident()
        for key in admission.popularity.ranked(computed):
            with tier.lock:
                used = {*tier.latest, *tier.pinned_keys()}
                staying = staying_for(tier.residency, key, used, in_ram, admission)
            if staying is not None:
                tier.prefetch([key], 1, staying)
                return


def _num_rows(experts: Sequence[Any] | np.ndarray, starts: np.ndarray | None) -> list[int]:
    """How many rows of activations each has; one, if `starts` does not say."""
    return [1] * len(experts) if starts is None else np.diff(starts).tolist()


class ExpertsOfCards:
    """Where a decoder's experts come from whose layers lie on one GPU or several: `sources` by
    layer, of which those of a card's layers are the same."""

    def __init__(self, sources: dict[int, PlacedExperts]) -> None:
        self.sources = sources
        self.cards = list(dict.fromkeys(sources.values()))

    def fetch(
        self, layer: int, experts: np.ndarray, starts: np.ndarray | None = None
    ) -> Iterator[Group]:
        return self.sources[layer].fetch(layer, experts, starts)

    def table(self, layer: int) -> None:
        """The tiers must know which are used."""

    @property
    def hits(self) -> int:
        return sum(card.hits for card in self.cards)

    @property
    def copies(self) -> int:
        return sum(card.copies for card in self.cards)

    @property
    def computed_in_ram(self) -> int:
        return sum(card.computed_in_ram for card in self.cards)
