"""GPUs' part of the memory hierarchy: which layers are whose, slots, the tiers above RAM."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from tiered import policies
from tiered.checkpoints.checkpoint import Checkpoint
from tiered.config import EngineConfig
from tiered.experts import ExpertKey
from tiered.gpu.busy import Busy, Channel
from tiered.gpu.placement import Balanced, ExpertsOfCards, PlacedExperts
from tiered.gpu.shares import LayerBytes, Share, check_shares, parse_vram, share_out
from tiered.gpu.uploads import MappedBlobs, TimedReads, Uploads
from tiered.kv_cache import layer_bytes
from tiered.memory import format_bytes
from tiered.planning.admission import Admission
from tiered.planning.costs import Costs
from tiered.policies import Space
from tiered.simulated.timing import REAL, Timing
from tiered.source import MappedExperts, TieredExperts
from tiered.store import ExpertStore
from tiered.tier import Tier
from tiered.weights.dense import dense_bytes_by_layer

SHRINK = 0.9  # when the device has less memory than it said


def model_bytes(
    checkpoint: Checkpoint,
    store: ExpertStore | None,
    choices: EngineConfig,
    num_tokens: int,
    num_texts: int,
) -> LayerBytes:
    """What a model, with a KV cache of `num_tokens` tokens of `num_texts` texts, takes on GPUs.

    All slots of a card are as large as the largest expert. Embeddings are not there: their rows are
    looked up in RAM.
    """
    config = checkpoint.config
    *dense, output = dense_bytes_by_layer(checkpoint, choices.quantize)
    kept = [
        layer_bytes(config, layer, num_tokens, choices.kv_dtype, num_texts)
        for layer in range(config.num_layers)
    ]
    blobs = store.blob_bytes if store else [0] * config.num_layers
    return LayerBytes(
        [sum(pair) for pair in zip(dense, kept, strict=True)],
        [nbytes * config.num_experts for nbytes in blobs],
        output,
        max(blobs) * (config.top_k + 1),
    )


def spread(cards: Any, model: LayerBytes, choices: EngineConfig) -> list[Share]:
    """Tell the cards of a backend which layers are whose, before anything is there.

    Raises MemoryError with the numbers that would work.
    """
    limits = parse_vram(choices.vram, len(cards.cards))
    free = [card.device.usable_bytes for card in cards.cards]
    rooms = [_least(*pair) for pair in zip(free, limits, strict=True)]
    known = [room for room in rooms if room is not None]
    if len(known) < len(rooms):  # torch's CPU device has what is wanted
        shares = share_out(model, [1] * len(rooms))
    else:
        shares = share_out(model, known)
        check_shares(model, shares, known, cards.names)
    cards.spread([share.layers for share in shares])
    return [share._replace(room=room) for share, room in zip(shares, rooms, strict=True)]


def _least(*sizes: int | None) -> int | None:
    """Of those that are known."""
    return min((size for size in sizes if size is not None), default=None)


def place_experts(
    cards: Any,
    shares: list[Share],
    store: ExpertStore,
    below: MappedExperts | TieredExperts,
    choices: EngineConfig,
    stack: ExitStack,
    timing: Timing = REAL,
) -> ExpertsOfCards:
    """Give what is left of each card's memory to the experts of its layers, and say where each
    runs.

    Call it last: dense weights and the KV cache are there already. `stack` closes the tiers.
    Raises MemoryError that names the card.
    """
    sources: dict[int, PlacedExperts] = {}
    for card, name, share in zip(cards.cards, cards.names, shares, strict=True):
        layers = [layer for layer in share.layers if store.blob_bytes[layer]]
        if layers:
            left = None if share.room is None else share.room - share.fixed
            room = _least(card.device.usable_bytes, left)
            source = _place_on(card, name, layers, room, store, below, choices, stack, timing)
            sources |= dict.fromkeys(layers, source)
    placed = ExpertsOfCards(sources)
    if isinstance(below, TieredExperts):
        _beneath(below.tier, placed, timing)
    return placed


def _beneath(ram: Tier, placed: ExpertsOfCards, timing: Timing) -> None:
    """A RAM tier below GPUs: what they have leaves it first, and its reads are timed."""

    def is_above(key: ExpertKey) -> bool:
        return key.layer in placed.sources and key in placed.sources[key.layer].vram

    def observe(nbytes: float, seconds: float, overlap: float) -> None:
        for card in placed.cards:
            card.costs.disk.observe(nbytes, seconds)

    ram.residency.is_above = is_above
    reads = Channel(observe, Busy(timing.clock))
    ram.source = TimedReads(ram.source, ram.memory.space, reads)


def _place_on(
    card: Any,
    name: str,
    layers: list[int],
    room: int | None,
    store: ExpertStore,
    below: MappedExperts | TieredExperts,
    choices: EngineConfig,
    stack: ExitStack,
    timing: Timing,
) -> PlacedExperts:
    config, nbytes = store.checkpoint.config, max(store.blob_bytes)
    per_layer = tuple(nbytes if layer in layers else 0 for layer in range(config.num_layers))
    num_experts, least = len(layers) * config.num_experts, config.top_k + 1
    wanted = num_experts if room is None else min(num_experts, room // nbytes)
    if wanted < least:
        raise MemoryError(
            f"{name} has {format_bytes(max(0, room or 0))} left for experts, and "
            f"{format_bytes(least * nbytes)} is the least: give a smaller --context, or more GPUs"
        )
    layouts = {layer: store.layout(layer) for layer in layers}
    slots = None
    while slots is None:
        space = Space(wanted * nbytes, per_layer)
        try:
            slots = card.slots(space, layouts, config.num_experts)
        except MemoryError:
            if wanted == least:
                raise
            wanted = max(least, int(wanted * SHRINK))
    blobs = MappedBlobs(store) if isinstance(below, MappedExperts) else below.tier
    policy = policies.create(choices.policy, space)
    costs, cpu = card.device.costs(nbytes) or Costs.unknown(nbytes), Busy(timing.clock)
    link = Channel(costs.observe_link, cpu)
    tier = Tier(
        slots,
        Uploads(blobs, slots, link),
        policy,
        loaders=3,
        clock=timing.clock,
        make_loaders=timing.make_loaders,
    )
    stack.enter_context(tier)
    return PlacedExperts(
        tier,
        below,
        store,
        Balanced(costs),
        costs,
        few_rows=card.few_rows,
        admission=Admission(space, costs),
        clock=timing.clock,
        cpu=cpu,
        link=link,
    )
