"""A GPU's part of the memory hierarchy: its slots, the tier above RAM, placement between them."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from tiered import memory, policies
from tiered.config import EngineConfig, ModelConfig
from tiered.gpu.placement import Balanced, PlacedExperts
from tiered.gpu.uploads import MappedBlobs, Uploads
from tiered.planning.admission import Admission
from tiered.planning.costs import Costs
from tiered.policies import Space
from tiered.source import MappedExperts, TieredExperts
from tiered.store import ExpertStore
from tiered.tier import Tier

SHRINK = 0.9  # when the device has less memory than it said
RESERVE = 0.05  # of what is free: workspace, and what the driver takes later


def place_experts(
    backend: Any,
    store: ExpertStore,
    below: MappedExperts | TieredExperts,
    config: ModelConfig,
    choices: EngineConfig,
    used: int,
    stack: ExitStack,
) -> PlacedExperts:
    """Give what is left of the GPU's memory to experts, and say where each runs.

    Call it last: `used` bytes (dense weights, KV cache) are there already. `stack` closes the tier.
    Raises MemoryError with the number that would work.
    """
    nbytes = max(store.blob_bytes)
    per_layer = tuple(nbytes if size else 0 for size in store.blob_bytes)
    num_experts = len(config.sparse_layers) * config.num_experts
    free = backend.device.free_bytes
    budget = num_experts * nbytes if free is None else int(free * (1 - RESERVE))
    if choices.vram is not None:
        budget = min(budget, memory.parse_bytes(choices.vram) - used)
    least = config.top_k + 1
    wanted = min(num_experts, budget // nbytes)
    if wanted < least:
        raise MemoryError(
            f"the GPU has {memory.format_bytes(max(0, budget))} left for experts, and "
            f"{memory.format_bytes(least * nbytes)} is the least: give --vram at least "
            f"{memory.format_bytes(used + least * nbytes)}, or a smaller --context"
        )
    layouts = {layer: store.layout(layer) for layer in config.sparse_layers}
    slots = None
    while slots is None:
        space = Space(wanted * nbytes, per_layer)
        try:
            slots = backend.slots(space, layouts, config.num_experts)
        except MemoryError:
            if wanted == least:
                raise
            wanted = max(least, int(wanted * SHRINK))
    blobs = MappedBlobs(store) if isinstance(below, MappedExperts) else below.tier
    policy = policies.create(choices.policy, space)
    tier = stack.enter_context(Tier(slots, Uploads(blobs, slots), policy, loaders=3))
    costs = Costs.unknown(nbytes)
    return PlacedExperts(
        tier,
        below,
        store,
        Balanced(costs),
        costs,
        few_rows=backend.few_rows,
        admission=Admission(space, costs),
    )
