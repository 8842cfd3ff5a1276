"""Several GPUs: each has some of a model's layers, one after the other, with all that is theirs."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch

from gpu_backend.backend import GpuBackend
from gpu_backend.device import allocating
from gpu_backend.kv import KVPages, kv_pages
from gpu_backend.recurrent import RecurrentState, copy_state


class Cards:
    """The backend of a decoder whose layers lie on one card or several, which share a host.

    What computes is asked of the card that `of_layer` tells; here is what they have in common.
    `names` are for people.
    """

    finds_experts = GpuBackend.finds_experts

    def __init__(self, cards: Sequence[GpuBackend], names: Sequence[str]) -> None:
        self.cards = list(cards)
        self.names = list(names)
        self.name = ",".join(names)
        self._owners = self.cards[:1]  # by layer

    def spread(self, layers: Sequence[range]) -> None:
        """Say which layers are whose, before any is prepared: a range for each card."""
        self._owners = [
            card for card, own in zip(self.cards, layers, strict=True) for _ in own
        ]  # fmt: skip

    def chain(self, num_tokens: int, layers: Any) -> AbstractContextManager[None]:
        return self.cards[0].chain(num_tokens, layers)

    def again(self, layers: Any, table: Any, batch: Any, kv: Any, scale: float = 1.0) -> None:
        """Never: a device is given each pass anew."""

    def chained_seconds(self) -> dict[str, float]:
        return self.cards[0].chained_seconds()

    def of_layer(self, index: int) -> GpuBackend:
        return self._owners[index]

    @property
    def isa(self) -> str:
        return self.cards[0].isa

    @property
    def num_threads(self) -> int:
        return self.cards[0].num_threads

    @property
    def seconds(self) -> float:
        return self.cards[0].seconds

    @property
    def few_rows(self) -> int:
        return self.cards[0].few_rows

    def kv_pages(self, config: Any, num_pages: int, page_size: int, dtype: str) -> KVPages:
        with allocating("the KV cache", self.name):
            return kv_pages(config, num_pages, page_size, dtype, self._devices)

    def recurrent_state(self, config: Any) -> RecurrentState:
        with allocating("what recurrent layers remember of a text", self.name):
            return RecurrentState(config, self._devices)

    def copy_state(self, source: RecurrentState, target: RecurrentState) -> None:
        copy_state(source, target)

    @property
    def _devices(self) -> list[torch.device]:
        return [card.device.torch_device for card in self._owners]

    def close(self) -> None:
        for card in self.cards:
            card.close()
