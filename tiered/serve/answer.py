"""A request's events in an asyncio program."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from types import TracebackType

from tiered.serve.errors import ApiError
from tiered.serve.request import Event, Finish, Request
from tiered.serve.scheduler import Busy, Scheduler


class Answer:
    """`async with Answer(scheduler, request) as answer: async for event in answer.events(): ...`

    The request is queued when the block is entered, and cancelled if the block is left early.
    Raises ApiError if it cannot be queued, or fails.
    """

    def __init__(self, scheduler: Scheduler, request: Request) -> None:
        self.scheduler = scheduler
        self.request = request
        self.finish: Finish | None = None
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Event] = asyncio.Queue()

    async def __aenter__(self) -> Answer:
        self.submit()
        return self

    def submit(self) -> Answer:
        try:
            self._job = self.scheduler.submit(self.request, self._events.put_nowait, self._loop)
        except Busy as error:
            status = 503 if "shutting down" in str(error) else 429
            raise ApiError(str(error), status, code="server_busy") from None
        except ValueError as error:
            raise ApiError(str(error), code="context_length_exceeded") from None
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        if self.finish is None:
            self.scheduler.cancel(self._job)

    async def events(self) -> AsyncIterator[Event]:
        while self.finish is None:
            event = await self._events.get()
            if isinstance(event, Finish):
                self.finish = event
                if event.reason == "timeout":
                    raise ApiError("the request took longer than the server allows", 504)
                if event.reason == "cancelled":
                    raise ApiError("the server is shutting down", 503)
                if event.error is not None:
                    raise ApiError(f"the request failed: {event.error}", 500)
            yield event
