"""A worker: an engine, and the server's own endpoints in front of it, without a network."""

from __future__ import annotations

import asyncio
import json
import logging
import math
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from tiered.engine import Engine
from tiered.serve.app import make_app
from tiered.serve.errors import ApiError, error_body
from tiered.serve.scheduler import Scheduler
from tiered.serve.service import Limits, Service

log = logging.getLogger("tiered")
NO_LIMITS = Limits(body_bytes=1 << 40, request_seconds=math.inf)


class Worker:
    """Answers requests with one engine, at most `parallel` at once. Open it, and close it."""

    def __init__(self, path: Path, choices: dict[str, Any], parallel: int) -> None:
        self.path = path
        self.choices = choices
        self.parallel = parallel
        self._closing = ExitStack()

    def open(self) -> Worker:
        with ExitStack() as stack:
            engine = stack.enter_context(Engine(self.path, **self.choices))
            scheduler = Scheduler(engine, max_running=self.parallel, max_waiting=1 << 30)
            stack.enter_context(scheduler)
            name = self.path.stem if self.path.is_file() else self.path.name
            # "*": whatever model a request names, it is meant for this one.
            service = Service(engine, scheduler, [name, "*"], NO_LIMITS)
            self._app = make_app(service)
            self._closing = stack.pop_all()
        return self

    async def ask(self, url: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        """The status and the body of the answer; what fails is an answer, too."""
        chunks, status = bytearray(), 500
        asked = [{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}]

        async def receive() -> Any:
            if asked:
                return asked.pop()
            await asyncio.Event().wait()  # the client never goes away

        async def send(message: Any) -> None:
            nonlocal status
            status = message.get("status", status)
            chunks.extend(message.get("body", b""))

        scope = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST",
            "scheme": "http", "path": url, "raw_path": url.encode(), "root_path": "",
            "query_string": b"", "headers": [], "client": ("batch", 0), "server": ("batch", 0),
        }  # fmt: skip
        try:
            await self._app(scope, receive, send)
            return status, json.loads(bytes(chunks))
        except Exception as error:  # of this request alone: the others go on
            log.exception("a request failed")
            return 500, error_body(ApiError(f"the request failed: {error}", 500), url)

    def close(self) -> None:
        """Closing twice is harmless."""
        self._closing.close()

    def __enter__(self) -> Worker:
        return self.open()

    def __exit__(self, *_: object) -> None:
        self.close()
