"""Who is next: clients take turns, and one client's requests keep their order."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

Item = TypeVar("Item")


class FairQueue(Generic[Item]):
    """A first-in-first-out queue for each client, served in turn. Not thread-safe."""

    def __init__(self) -> None:
        self._front: list[Item] = []  # returned to the queue: before all others
        self._waiting: OrderedDict[str, deque[Item]] = OrderedDict()  # first: whose turn it is

    def __len__(self) -> int:
        return len(self._front) + sum(map(len, self._waiting.values()))

    def __iter__(self) -> Iterator[Item]:
        yield from self._front
        for items in self._waiting.values():
            yield from items

    def push(self, client: str, item: Item) -> None:
        self._waiting.setdefault(client, deque()).append(item)

    def put_back(self, item: Item) -> None:
        """An item that was taken, and could not be served yet."""
        self._front.append(item)

    def peek(self) -> Item | None:
        """What `pop` would take."""
        if self._front:
            return self._front[-1]
        return next(iter(self._waiting.values()))[0] if self._waiting else None

    def pop(self) -> Item:
        if self._front:
            return self._front.pop()
        client, items = self._waiting.popitem(last=False)
        item = items.popleft()
        if items:
            self._waiting[client] = items  # behind the others
        return item

    def remove_if(self, unwanted: Callable[[Item], bool]) -> list[Item]:
        """Take out and return what is not wanted any more."""
        removed = [item for item in self if unwanted(item)]
        if removed:
            gone = set(map(id, removed))
            self._front = [item for item in self._front if id(item) not in gone]
            for client, items in list(self._waiting.items()):
                kept = deque(item for item in items if id(item) not in gone)
                if kept:
                    self._waiting[client] = kept
                else:
                    del self._waiting[client]
        return removed
