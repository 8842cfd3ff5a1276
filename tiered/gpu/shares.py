"""Which layers lie on which GPU, and whether each has the memory for its part."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

from tiered.memory import format_bytes, parse_bytes

MIB = 1 << 20


class LayerBytes(NamedTuple):
    """What a model takes on a device; lists are by layer."""

    fixed: Sequence[int]  # dense weights, what recurrent layers remember
    kv: Sequence[int]  # keys and values of all texts, when they are as long as they may be
    experts: Sequence[int]  # all experts of the layer; 0 for a dense one
    output: int  # the last norm and the head
    least: int  # so many bytes of experts a card must hold at once, if it has any
    workspace: int = 0  # of each card


class Share(NamedTuple):
    """One card's part of a model."""

    layers: range
    fixed: int  # bytes that are there as long as the model is, and workspace
    kv: int  # bytes of keys and values, which experts may have until they are needed
    least: int  # bytes of experts without which its layers cannot be computed
    room: int | None = None  # bytes of the card that may be used; None: as many as are wanted

    @property
    def needed(self) -> int:
        return self.fixed + self.kv + self.least


def share_out(model: LayerBytes, memory: Sequence[int]) -> list[Share]:
    """A share for each card: layers that follow each other, in proportion to its bytes of memory.

    Each has one layer at least. Raises ValueError if there are more cards than layers.
    """
    num_layers, num_cards = len(model.fixed), len(memory)
    if num_cards > num_layers:
        raise ValueError(f"{num_cards} GPUs are too many for {num_layers} layers: name fewer")
    sizes = [sum(layer) for layer in zip(model.fixed, model.kv, model.experts, strict=True)]
    ends = list(accumulate(sizes))
    middles = [end - size / 2 for end, size in zip(ends, sizes, strict=True)]
    total, starts = ends[-1] + model.output, [0]
    for number, before in enumerate(list(accumulate(memory))[:-1], 1):
        start = bisect_left(middles, total * before / max(1, sum(memory)))
        starts.append(min(max(start, starts[-1] + 1), num_layers - num_cards + number))
    ranges = [range(*pair) for pair in zip(starts, [*starts[1:], num_layers], strict=True)]
    return [_share(model, layers) for layers in ranges]


def _share(model: LayerBytes, layers: range) -> Share:
    fixed = model.workspace + sum(model.fixed[layer] for layer in layers)
    kv = sum(model.kv[layer] for layer in layers)
    if layers.stop == len(model.fixed):
        fixed += model.output
    has_experts = any(model.experts[layer] for layer in layers)
    return Share(layers, fixed, kv, model.least if has_experts else 0)


def check_shares(
    model: LayerBytes, shares: Sequence[Share], memory: Sequence[int], names: Sequence[str]
) -> None:
    """MemoryError names the card that has too little, and sizes that work for all of them."""
    for share, room, name in zip(shares, memory, names, strict=True):
        if room < share.needed:
            last = share.layers.stop - 1
            raise MemoryError(
                f"{name} has {format_bytes(max(0, room))} for layers {share.layers.start} to "
                f"{last}, and {format_bytes(share.needed)} is the least: give --vram at least "
                f"{','.join(f'{size // MIB}M' for size in enough(model, memory))}, "
                "or a smaller --context"
            )


def enough(model: LayerBytes, memory: Sequence[int]) -> list[int]:
    """Whole MiB, none less than `memory` has, with which each card can hold what it is given."""
    sizes = [max(1, -(-room // MIB)) * MIB for room in memory]
    while True:
        needed = [-(-share.needed // MIB) * MIB for share in share_out(model, sizes)]
        if all(size >= need for size, need in zip(sizes, needed, strict=True)):
            return sizes
        sizes = [max(pair) for pair in zip(sizes, needed, strict=True)]


def parse_vram(vram: int | str | None, num_cards: int) -> list[int | None]:
    """Bytes for each card: "16G" is each one's, "16G,8G" is theirs in turn; None: not limited."""
    if vram is None:
        return [None] * num_cards
    sizes = [parse_bytes(size) for size in str(vram).split(",")]
    if len(sizes) not in (1, num_cards):
        raise ValueError(
            f"--vram {vram} has {len(sizes)} sizes for {num_cards} GPUs: give one for each, or one "
            "for all"
        )
    return [*sizes * (num_cards if len(sizes) == 1 else 1)]
