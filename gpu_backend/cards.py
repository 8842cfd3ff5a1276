"""Several GPUs: each has some of a model's layers, one after the other, with all that is theirs."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any


class Cards:
    """The backend of a decoder whose layers lie on one card or several, which share a host.

    What computes is asked of the card that `of_layer` tells; here is what they have in common.
    `names` are for people.
    """

    finds_experts = False

    def __init__(self, cards: Sequence[Any], names: Sequence[str]) -> None:
        self.cards = list(cards)
        self.names = list(names)
        self.name = ",".join(names)
        self._owners = self.cards[:1]  # by layer

    def spread(self, layers: Sequence[range]) -> None:
        """Say which layers are whose, before any is prepared: a range for each card."""
        self._owners = [
            card for card, own in zip(self.cards, layers, strict=True) for _ in own
        ]  # fmt: skip

    def of_layer(self, index: int) -> Any:
        return self._owners[index]

    def chain(self, num_tokens: int, layers: Any) -> AbstractContextManager[None]:
        return nullcontext()  # devices put off everything by themselves

    def again(self, layers: Any, table: Any, batch: Any, kv: Any, scale: float = 1.0) -> None:
        """Never: a device is given each pass anew."""

    def chained_seconds(self) -> dict[str, float]:
        return {}

    @property
    def isa(self) -> str:
        isa: str = self.cards[0].isa
        return isa

    @property
    def num_threads(self) -> int:
        count: int = self.cards[0].num_threads
        return count

    @property
    def seconds(self) -> float:
        seconds: float = self.cards[0].seconds
        return seconds

    @property
    def few_rows(self) -> int:
        count: int = self.cards[0].few_rows
        return count

    def close(self) -> None:
        for card in self.cards:
            card.close()
