"""Server-sent events: a response that is written as it comes about, until the client goes away."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator
from typing import Any

from starlette.types import Receive, Scope, Send

QUIET_SECONDS = 15.0  # after so long without an event a comment shows that we are alive
COMMENT = b": still here\n\n"
HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # proxies must not collect the events
]

_encode = json.JSONEncoder(separators=(",", ":")).encode


def event(data: Any, name: str | None = None) -> bytes:
    """One event; `data` becomes JSON unless it is text."""
    text = data if isinstance(data, str) else _encode(data)
    head = f"event: {name}\n" if name else ""
    return f"{head}data: {text}\n\n".encode()


class EventStream:
    """An ASGI response of the bytes that `events` yields.

    When the client goes away `events` is closed at once, whatever it waits for.
    """

    def __init__(self, events: AsyncGenerator[bytes, None]) -> None:
        self.events = events
        self._written = 0.0  # the loop's time, when something was last

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": HEADERS})
        self._written = asyncio.get_running_loop().time()
        writing = asyncio.ensure_future(self._write(send))
        others = [asyncio.ensure_future(each) for each in (gone(receive), self._beat(send))]
        try:
            await asyncio.wait({writing, *others}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (writing, *others):
                task.cancel()
            results = await asyncio.gather(writing, *others, return_exceptions=True)
            await self.events.aclose()
        failure = results[0]
        if isinstance(failure, Exception) and not isinstance(failure, OSError):
            raise failure

    async def _write(self, send: Send) -> None:
        loop = asyncio.get_running_loop()
        async for chunk in self.events:
            self._written = loop.time()
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _beat(self, send: Send) -> None:
        """Write a comment whenever nothing else has been written for a while."""
        loop = asyncio.get_running_loop()
        while True:
            left = self._written + QUIET_SECONDS - loop.time()
            if left > 0:
                await asyncio.sleep(left)
            else:
                self._written = loop.time()
                await send({"type": "http.response.body", "body": COMMENT, "more_body": True})


async def gone(receive: Receive) -> None:
    """Returns when the client has closed the connection."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def unless_gone(receive: Receive, work: Any) -> Any:
    """What the coroutine `work` returns; it is cancelled, and None returned, if the client goes."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(gone(receive))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            return None
        return working.result()
    finally:
        for task in (working, leaving):
            task.cancel()
        with contextlib.suppress(BaseException):
            await asyncio.gather(working, leaving, return_exceptions=True)
