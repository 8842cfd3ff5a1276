"""A cold copy: the same model in fewer bits, from which experts of little weight are read.

While a token is written, an expert that is not in memory and has little of the token's weight is
read from the copy, which takes fewer bytes, instead of the model's own file. It does not enter the
expert cache: the next token that gives it much weight reads it whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from tiered import policies
from tiered.experts import ExpertJobs, ExpertKey, Routing
from tiered.formats import CheckpointError, open_checkpoint
from tiered.memory import format_bytes
from tiered.routing import Cold
from tiered.slots import RamMemory
from tiered.source import TieredExperts
from tiered.stats import EngineStats
from tiered.store import ExpertStore
from tiered.tier import Tier

# What two copies of a model have in common. (Of the rest, files of different formats tell some
# rounded and some not at all, and experts do not depend on it.)
FACTS = (
    "num_layers", "dense_layers", "hidden_size", "vocab_size", "num_heads", "head_dim",
    "num_experts", "top_k", "expert_size", "activation", "activation_limit", "expert_biases",
    "weighted_inputs",
)  # fmt: skip

# What a backend computes jobs with, where their experts' matrices lie (int64 [count, 3]), the jobs.
Late = tuple[Any, np.ndarray, ExpertJobs]


class ColdCopy:
    """Experts of the copy, in a tier of their own that holds one token's experts of one layer.

    `layers`: what the backend computes them with, by layer. `below`: of a token's largest weight;
    experts of less are cold if they are not `is_resident`.
    """

    def __init__(
        self,
        experts: TieredExperts,
        layers: Mapping[int, Any],
        below: float,
        is_resident: Callable[[ExpertKey], bool],
    ) -> None:
        self.experts = experts
        self.layers = layers
        self.below = below
        self.is_resident = is_resident
        self.served = 0  # experts, token by token
        self.served_weight = 0.0  # and what they had of ...
        self.weight = 0.0  # ... all weights

    def split(
        self, layer: int, routing: Routing, jobs: ExpertJobs
    ) -> tuple[ExpertJobs, ExpertJobs | None]:
        """A layer's jobs, and those of them that the copy should do. An expert that has much weight
        for any token is read whole, and then serves all of them."""
        weights = routing.weights
        if len(weights) > Cold.MOST_TOKENS:
            return jobs, None
        self.weight += float(weights.sum())
        is_light = weights < self.below * weights.max(axis=1, keepdims=True)
        all_light = np.logical_and.reduceat(is_light.reshape(-1)[jobs.pairs], jobs.starts[:-1])
        for i in np.flatnonzero(all_light).tolist():
            all_light[i] = not self.is_resident(ExpertKey(layer, int(jobs.experts[i])))
        if not all_light.any():
            return jobs, None
        cold = jobs.take(np.flatnonzero(all_light))
        self.served += len(cold.pairs)
        self.served_weight += float(weights.reshape(-1)[cold.pairs].sum())
        return jobs.take(np.flatnonzero(~all_light)), cold

    @contextmanager
    def fetch(self, layer: int, jobs: ExpertJobs) -> Iterator[Iterator[Late]]:
        """Begin to read what these jobs need: it comes, as it is ready, within the block."""
        keys = [ExpertKey(layer, expert) for expert in jobs.experts.tolist()]
        with self.experts.tier.fetch(keys) as groups:
            found = self.experts.addressed(groups, layer, jobs.experts)
            yield ((self.layers[layer], addresses, jobs.take(ready)) for ready, addresses in found)

    @property
    def bytes_read(self) -> int:
        return self.experts.tier.stats.bytes_read

    def report(self, stats: EngineStats) -> None:
        """Write what was counted so far to `stats`."""
        stats.copied_experts, stats.copied_weight = self.served, self.served_weight
        stats.computed_weight = self.weight
        stats.bytes_read += self.bytes_read


def open_copy(path: Path, store: ExpertStore, quantize: str, stack: ExitStack) -> ExpertStore:
    """The copy's experts, which `stack` closes. CheckpointError if it is a copy of another model
    than `store` is of, or its experts take no fewer bytes."""
    config = store.checkpoint.config.without_drafts()
    checkpoint = stack.enter_context(open_checkpoint(path))
    other = checkpoint.config
    differing = [name for name in FACTS if getattr(config, name) != getattr(other, name)]
    model = store.checkpoint.path
    if differing:
        raise CheckpointError(
            f"{path} is no copy of {model}: they differ in {', '.join(differing)}; make one with "
            "`tiered convert`"
        )
    copy = ExpertStore(checkpoint, quantize)
    stack.callback(copy.close)
    if sum(copy.layer_bytes) >= sum(store.layer_bytes[: config.num_layers]):
        sizes = [format_bytes(max(each.blob_bytes)) for each in (copy, store)]
        raise CheckpointError(
            f"{path} has experts of {sizes[0]}, and {model} of {sizes[1]}: a cold copy saves "
            "something only if it has fewer bits"
        )
    return copy


def copy_bytes(copy: ExpertStore) -> int:
    """What its slots take: a token's experts of one layer."""
    return copy.checkpoint.config.top_k * max(copy.blob_bytes)


def copy_tier(copy: ExpertStore, readers: int, stack: ExitStack) -> TieredExperts:
    """Experts of the copy on their way through a tier that `stack` closes."""
    space = copy.space(copy_bytes(copy))
    tier = Tier(RamMemory(space), copy, policies.create("lru", space), readers)
    stack.callback(tier.close)
    return TieredExperts(tier, copy.offsets)
