"""GPUs' part of the memory hierarchy: which layers are whose, slots, the tiers above RAM."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import psutil

from tiered import policies
from tiered.budget import PASS_SHARE, pass_bytes, pass_tokens, workspace_bytes
from tiered.cache.residency import Above
from tiered.checkpoints.checkpoint import Checkpoint
from tiered.config import EngineConfig, ModelConfig
from tiered.experts import BLOB_ALIGNMENT, aligned
from tiered.gpu.busy import Busy, Channel
from tiered.gpu.known_costs import known_costs, measure_rows
from tiered.gpu.placement import ExpertsOfCards, PlacedExperts
from tiered.gpu.shared_room import SharedMemory, SharedRoom
from tiered.gpu.shares import LayerBytes, Share, check_shares, parse_vram, share_out
from tiered.gpu.splits import Balanced, Governed
from tiered.gpu.uploads import MappedBlobs, TimedReads, Uploads
from tiered.kv_cache import device_bytes
from tiered.measuring.this_machine import known_gpus
from tiered.memory import format_bytes
from tiered.page_locked import USABLE
from tiered.planning.admission import Admission
from tiered.planning.costs import Costs
from tiered.policies import Space
from tiered.simulated.timing import Timing
from tiered.slots import RamMemory
from tiered.source import MappedExperts, TieredExperts
from tiered.store import ExpertStore
from tiered.tier import Tier
from tiered.weights.dense import dense_bytes_by_layer

NUM_STAGING = 3  # buffers that copies pass, each as large as a slot
SCORES = 1 << 25  # of attention that are there at once, at most
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
    layers, largest = range(config.num_layers), max(store.blob_bytes) if store else 0
    states = [num_texts * 4 * config.state_values * (n in config.recurrent_layers) for n in layers]
    blobs = store.blob_bytes if store else [0] * config.num_layers
    return LayerBytes(
        [sum(pair) for pair in zip(dense, states, strict=True)],
        [device_bytes(config, layer, num_tokens, choices.kv_dtype) for layer in layers],
        [nbytes * config.num_experts for nbytes in blobs],
        output,
        largest * (config.top_k + 1),
        device_workspace(config, choices, num_tokens) + NUM_STAGING * largest,
    )


def device_workspace(config: ModelConfig, choices: EngineConfig, num_tokens: int) -> int:
    """Scratch on a card: what the CPU needs, and attention's float32 keys, values (one of the two
    once more, while it is made of what is kept) and scores."""
    length = min(num_tokens, choices.context or num_tokens)
    shapes = [config.attention_shape(layer) for layer in config.attention_layers]
    widest = max((shape.num_kv_heads * shape.head_dim for shape in shapes), default=0)
    scores = min(SCORES, choices.prefill_chunk * config.num_heads * length)
    return workspace_bytes(config, choices.prefill_chunk) + 4 * (3 * length * widest + 2 * scores)


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


def pass_on_cards(
    shares: list[Share], longest: int, config: ModelConfig, choices: EngineConfig
) -> tuple[list[Share], int]:
    """Tokens of a prompt to compute at once (see tiered.chunks), up to `longest`, and the shares
    without the memory for it: a small part of what a card has left for experts."""
    left = [0 if share.room is None else share.room - share.needed for share in shares]
    nbytes, chunk = pass_bytes(config), choices.prefill_chunk
    tokens = pass_tokens(chunk, longest, int(min(left) * PASS_SHARE), nbytes)
    longer = (tokens - chunk) * nbytes
    return [
        share if share.room is None else share._replace(room=share.room - longer)
        for share in shares
    ], tokens


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
    timing: Timing,
    num_pages: int,
    prepared: Mapping[int, Any],
) -> tuple[ExpertsOfCards, SharedRoom]:
    """Give what weights have left of each card's memory to the experts of its layers, and say where
    each runs; a KV cache of `num_pages` pages takes it from them as it grows. `prepared` is what
    backends compute experts with, by layer.

    Call it when dense weights are there already, and before the KV cache. `stack` closes the tiers.
    Raises MemoryError that names the card.
    """
    sources: dict[int, PlacedExperts] = {}
    shared: list[SharedMemory] = []
    for card, name, share in zip(cards.cards, cards.names, shares, strict=True):
        layers = [layer for layer in share.layers if store.blob_bytes[layer]]
        if layers:
            memory = _slots_on(card, name, share, layers, store)
            costs = known_costs(card, name, max(memory.space.blob_bytes))
            if known := [layer for layer in layers if layer in prepared]:
                layout = store.layouts(known[0]).layout(0)
                measure_rows(card, prepared[known[0]], layout, costs)
            placed = _place(card, memory, costs, store, below, choices, timing)
            stack.enter_context(placed.vram)
            sources |= dict.fromkeys(layers, placed)
            nbytes = len(memory.slab)
            shared.append(SharedMemory(card.device, placed.vram, nbytes, share.kv // num_pages))
    of_cards = ExpertsOfCards(sources)
    if isinstance(below, TieredExperts):
        _beneath(below.tier, of_cards, timing)
        assert isinstance(below.tier.memory, RamMemory)
        below.tier.memory.lock(cards.cards[0].device, lockable_bytes(cards))
    return of_cards, SharedRoom(shared)


def _place(
    card: Any,
    memory: Any,
    costs: Costs,
    store: ExpertStore,
    below: MappedExperts | TieredExperts,
    choices: EngineConfig,
    timing: Timing,
) -> PlacedExperts:
    """A tier over the slots of one card, and who says which experts come there."""
    cpu = Busy(timing.clock)
    link = Channel(costs.observe_link, cpu)
    source = MappedBlobs(store) if isinstance(below, MappedExperts) else below.tier
    tier = Tier(
        memory,
        Uploads(source, memory, link),
        policies.create(choices.policy, memory.space),
        loaders=NUM_STAGING,
        make_loaders=timing.make_loaders,
    )
    return PlacedExperts(
        tier,
        below,
        store,
        Governed(costs),
        costs,
        few_rows=card.few_rows,
        admission=Admission(memory.space, costs),
        clock=timing.clock,
        cpu=cpu,
        link=link,
        kernels=card.device.kernel_times.take,
        prompt_split=Balanced(costs),
    )


def lockable_bytes(cards: Any) -> int:
    """How much RAM may be page-locked for copies to these cards: a part of what `tiered calibrate`
    could lock, or what most systems allow."""
    described = cards.cards[0].device.lockable_bytes
    if described is not None:
        return int(described)
    known = known_gpus()
    probed = [known[name].get("pin_limit") for name in cards.names if name in known]
    tried = [nbytes for nbytes in probed if isinstance(nbytes, int)]
    return int(USABLE * min(tried)) if tried else psutil.virtual_memory().total // 2


def _beneath(ram: Tier, placed: ExpertsOfCards, timing: Timing) -> None:
    """A RAM tier below GPUs: what they have leaves it first, and its reads are timed."""

    def observe(nbytes: float, seconds: float, overlap: float) -> None:
        for card in placed.cards:
            card.costs.disk.observe(nbytes, seconds)

    ram.residency.above = [
        Above(card.vram.residency, card.admission.popularity.count, card.passing)
        for card in placed.cards
        if card.admission is not None
    ]
    reads = Channel(observe, Busy(timing.clock))
    ram.source = TimedReads(ram.source, ram.memory.space, reads)


def _slots_on(card: Any, name: str, share: Share, layers: list[int], store: ExpertStore) -> Any:
    """Slots for as many of the experts of these layers as there may be while the KV cache is empty,
    in a memory that has room for all of it, and for the fewest slots that work, at once."""
    config, nbytes = store.checkpoint.config, max(store.blob_bytes)
    per_layer = tuple(nbytes if layer in layers else 0 for layer in range(config.num_layers))
    layouts = {layer: store.layouts(layer) for layer in layers}
    num_experts, least = len(layers) * config.num_experts, config.top_k + 1
    wanted = aligned(num_experts * nbytes + share.kv)
    left = None if share.room is None else share.room - share.fixed
    if (room := _least(card.device.usable_bytes, left)) is not None:
        wanted = min(wanted, room // BLOB_ALIGNMENT * BLOB_ALIGNMENT)
    while wanted >= (needed := least * nbytes + share.kv):
        space = Space(min(num_experts, wanted // nbytes) * nbytes, per_layer)
        try:
            return card.slots(space, layouts, config.num_experts, wanted)
        except MemoryError:
            if wanted == needed or card.device.machine is not None:
                raise  # a simulated card has what is described, or it is another one
            wanted = max(needed, aligned(int(wanted * SHRINK)))
    raise MemoryError(
        f"{name} has {format_bytes(max(0, wanted))} left for keys, values and experts, and "
        f"{format_bytes(needed)} is the least: give a smaller --context, or more GPUs"
    )
