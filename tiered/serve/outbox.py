"""Events on their way from the scheduler's thread to asyncio programs."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable

from tiered.serve.request import Event

Receiver = Callable[[Event], None]
WAIT = 0.001  # seconds: by then the pass has begun


class Outbox:
    """Keeps events until `send`, which hands each loop all of its own at once. Every time, the
    loop's thread wakes up, and takes turns with ours at Python's lock: best while a forward pass,
    which does not need the lock, is computed. To begin it, our thread and those that it computes
    with do need the lock; so a loop reads its events only after WAIT."""

    def __init__(self) -> None:
        self._waiting: dict[asyncio.AbstractEventLoop, list[tuple[Receiver, Event]]] = {}

    def to(self, receiver: Receiver, loop: asyncio.AbstractEventLoop) -> Receiver:
        """Puts its events here; `receiver` gets them, in `loop`."""

        def put(event: Event) -> None:
            self._waiting.setdefault(loop, []).append((receiver, event))

        return put

    def send(self) -> None:
        waiting, self._waiting = self._waiting, {}
        for loop, events in waiting.items():
            with contextlib.suppress(RuntimeError):  # it has ended: nobody waits any more
                loop.call_soon_threadsafe(loop.call_later, WAIT, _deliver, events)


def _deliver(events: list[tuple[Receiver, Event]]) -> None:
    for receiver, event in events:
        receiver(event)
