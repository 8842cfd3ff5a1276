"""Experts: how they are named, where their tensors lie in a blob, and what the router chose."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from cpu_kernels.formats import FORMATS
from tiered.config import ModelConfig

BLOB_ALIGNMENT = 64  # bytes; every tensor of a blob starts on a cache line
HALVING = 16  # tokens ago, a use says half as much about what will be wanted soon


class ExpertKey(NamedTuple):
    """The name of one expert."""

    layer: int
    expert: int


class TensorLayout(NamedTuple):
    """One matrix inside a blob: `shape` is [out_features, in_features], `offset` in bytes."""

    format: str
    shape: tuple[int, int]
    offset: int

    @property
    def nbytes(self) -> int:
        return int(self.shape[0] * FORMATS[self.format].row_bytes(self.shape[1]))


class ExpertLayout(NamedTuple):
    """Where gate, up and down lie in an expert's blob."""

    gate: TensorLayout
    up: TensorLayout
    down: TensorLayout

    @property
    def nbytes(self) -> int:
        return aligned(self.down.offset + self.down.nbytes)

    @property
    def offsets(self) -> np.ndarray:
        """Byte offsets of gate, up and down: int64 [3]."""
        return np.array([self.gate.offset, self.up.offset, self.down.offset], np.int64)


class LayerLayouts(NamedTuple):
    """The layouts of a layer's experts: mostly one for all of them, else a mix of a few."""

    distinct: tuple[ExpertLayout, ...]
    kinds: np.ndarray  # int32 [num_experts]: which of `distinct` an expert has

    @classmethod
    def of(cls, layouts: Sequence[ExpertLayout]) -> LayerLayouts:
        """From the layout of each expert."""
        distinct = tuple(dict.fromkeys(layouts))
        return cls(distinct, np.array([distinct.index(each) for each in layouts], np.int32))

    @property
    def is_mix(self) -> bool:
        return len(self.distinct) > 1

    def layout(self, expert: int) -> ExpertLayout:
        return self.distinct[int(self.kinds[expert])]

    @property
    def blob_bytes(self) -> tuple[int, ...]:
        """Of each expert."""
        sizes = [layout.nbytes for layout in self.distinct]
        return tuple(sizes[kind] for kind in self.kinds)

    @property
    def offsets(self) -> np.ndarray:
        """Byte offsets of gate, up and down in each expert's blob: int64 [num_experts, 3]."""
        table: np.ndarray = np.stack([layout.offsets for layout in self.distinct])[self.kinds]
        return table


class ExpertTable(NamedTuple):
    """Where all experts of a layer lie, and how often each was used. These arrays stay what they
    are for as long as the model is used."""

    addresses: np.ndarray  # int64 [num_experts, 3]: of gate, up and down
    uses: np.ndarray  # int64 [num_experts], counted by whoever uses them


def aligned(nbytes: int, alignment: int = BLOB_ALIGNMENT) -> int:
    return -(-nbytes // alignment) * alignment


def expert_layout(
    hidden_size: int, expert_size: int, gate: str, up: str, down: str
) -> ExpertLayout:
    """The layout of an expert whose three matrices have the given number formats."""
    shapes = (expert_size, hidden_size), (expert_size, hidden_size), (hidden_size, expert_size)
    tensors, offset = [], 0
    for format, shape in zip((gate, up, down), shapes, strict=True):
        tensors.append(TensorLayout(format, shape, offset))
        offset = aligned(offset + tensors[-1].nbytes)
    return ExpertLayout(*tensors)


class Routing(NamedTuple):
    """What the router chose. Always NumPy: it steers, it is not data."""

    experts: np.ndarray  # int32   [num_tokens, top_k], best first
    weights: np.ndarray  # float32 [num_tokens, top_k]


def weighted_once(
    backend: Any, h: Any, weights: np.ndarray, config: ModelConfig
) -> tuple[Any, np.ndarray]:
    """What experts compute with, and what their results are multiplied with: hidden states and the
    routing weights; or, with `weighted_inputs`, hidden states times weights (of pairs), and 1."""
    if not config.weighted_inputs:
        return h, weights
    return backend.weighted(h, weights), np.ones_like(weights)


def prepared(backend: Any, layouts: LayerLayouts, config: ModelConfig, biases: Any = None) -> Any:
    """What the backend computes a layer's experts with: see Backend.expert_layer."""
    first, *others = layouts.distinct
    mix = (others, layouts.kinds) if layouts.is_mix else ()
    return backend.expert_layer(first, config, biases, *mix)


class ExpertJobs(NamedTuple):
    """A layer's (token, expert) pairs, grouped so that each used expert is fetched and run once.

    Pair `token * top_k + rank` is the `rank`-th choice of `token`; expert `experts[i]` computes
    pairs `pairs[starts[i]:starts[i + 1]]`.
    """

    experts: np.ndarray  # int32 [num_used], each once
    starts: np.ndarray  # int32 [num_used + 1]
    pairs: np.ndarray  # int32 [num_pairs]

    def take(self, selected: Sequence[int] | np.ndarray) -> ExpertJobs:
        """The jobs of some of the experts, given by their position in `experts`."""
        count = len(self.experts)
        if len(selected) == count and (
            isinstance(selected, range) or list(selected) == list(range(count))
        ):
            return self
        if len(self.pairs) == count:  # one each
            chosen = np.asarray(selected)
            starts, _ = _one_pair_each(len(chosen))
            return ExpertJobs(self.experts[chosen], starts, self.pairs[chosen])
        spans = [self.pairs[self.starts[i] : self.starts[i + 1]] for i in selected]
        starts = np.zeros(len(spans) + 1, np.int32)
        np.cumsum([len(span) for span in spans], out=starts[1:])
        return ExpertJobs(self.experts[np.asarray(selected)], starts, np.concatenate(spans))


@cache
def _one_pair_each(count: int) -> tuple[np.ndarray, np.ndarray]:
    """`starts` and `pairs` of so many experts with one pair each; shared, so read-only."""
    starts = np.arange(count + 1, dtype=np.int32)
    starts.flags.writeable = False
    return starts, starts[:-1]


def group_by_expert(routing: Routing) -> ExpertJobs:
    """Group a layer's (token, expert) pairs by expert, so that those that will be wanted soonest
    come last: of a prompt, a tier that cannot keep all of them keeps what came last.

    They are those that were used most, where later uses count more.
    """
    flat = routing.experts.reshape(-1)
    if len(routing.experts) == 1:  # decode: each choice is an expert of its own
        starts, pairs = _one_pair_each(len(flat))
        return ExpertJobs(flat, starts, pairs)
    return _by_expert(routing.experts, np.arange(len(flat)))


def _by_expert(choices: np.ndarray, pairs: np.ndarray) -> ExpertJobs:
    """Jobs of some of a layer's `choices` [num_tokens, top_k]: ascending `pairs`."""
    num_tokens, top_k = choices.shape
    chosen, age = choices.reshape(-1)[pairs], num_tokens - 1 - pairs // top_k
    counts = np.bincount(chosen)  # np.unique takes six times as long
    uses = np.bincount(chosen, np.ldexp(1.0, -(age // HALVING)))
    experts = np.flatnonzero(counts)
    experts = experts[np.argsort(uses[experts], kind="stable")]
    places = np.empty(len(counts), np.uint16)  # of 16 bits are sorted in a fifth of the time
    places[experts] = np.arange(len(experts))
    starts = np.zeros(len(experts) + 1, np.int32)
    np.cumsum(counts[experts], out=starts[1:])
    pairs = pairs[np.argsort(places[chosen], kind="stable")]
    return ExpertJobs(experts.astype(np.int32), starts, pairs.astype(np.int32))


def group_kept(routing: Routing) -> tuple[ExpertJobs, np.ndarray]:
    """Like `group_by_expert`, without the pairs of weight 0; and which pairs those are, int64."""
    weights = routing.weights.reshape(-1)
    return _by_expert(routing.experts, np.flatnonzero(weights)), np.flatnonzero(weights == 0)
