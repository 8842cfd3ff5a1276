"""The page, the stream of its live picture, and the settings that it can change."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from importlib import resources
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import HTMLResponse, JSONResponse, Response

from tiered.memory import parse_bytes
from tiered.serve.endpoint import read_fields, service_of
from tiered.serve.errors import ApiError
from tiered.serve.responding import written
from tiered.serve.service import Service
from tiered.serve.sse import EventStream

# Nothing from elsewhere is loaded, whatever a model writes.
POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'"
)


async def page(http: HttpRequest) -> Response:
    text = (resources.files("tiered.serve") / "page" / "index.html").read_text(encoding="utf-8")
    return HTMLResponse(text, headers={"Content-Security-Policy": POLICY})


async def live(http: HttpRequest) -> Response:
    """Frames of the live picture, until the client or the server goes."""
    service = service_of(http)
    return EventStream(written(_frames(service), http.url.path))  # type: ignore[return-value]


async def _frames(service: Service) -> AsyncGenerator[Any, None]:
    yield "description", {"model": service.name, **service.live.description()}
    async for frame in service.live.frames():
        if service.draining:
            return
        yield frame


async def settings(http: HttpRequest) -> Response:
    """Read, or change between two tokens, what can be changed while running."""
    service = service_of(http)
    if http.method == "POST":
        _, fields = await read_fields(http)
        engine, scheduler = service.engine, service.scheduler
        distance = fields.integer("look_ahead", None, 0, 3)
        running = fields.integer("max_running", None, 1, 1024)
        size = fields.get("expert_ram")
        if distance is not None:
            if engine.prefetcher is None:
                raise ApiError("there is no look-ahead: every expert is in memory, or it was "
                               "started with --look-ahead 0", param="look_ahead")  # fmt: skip
            engine.prefetcher.distance = distance
        if running is not None:
            scheduler.max_running = running
        if size is not None:
            await _resize(service, size)
    return JSONResponse(service.live.settings())


async def _resize(service: Service, size: Any) -> None:
    tier = service.live.tier
    if tier is None:
        raise ApiError("every expert is in memory: there is no budget", param="expert_ram")
    if not isinstance(size, (str, int)) or isinstance(size, bool):
        raise ApiError("expert_ram must be a size, as 2G", param="expert_ram")
    done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    loop = asyncio.get_running_loop()

    def settle(error: Exception | None) -> None:
        if done.cancelled():
            return
        if error is None:
            done.set_result(None)
        else:
            done.set_exception(ApiError(str(error), param="expert_ram"))

    def resize() -> None:  # in the engine's thread
        error: Exception | None = None
        try:
            tier.resize(parse_bytes(size))
        except (ValueError, MemoryError) as problem:
            error = problem
        loop.call_soon_threadsafe(settle, error)

    service.scheduler.call(resize)
    await done
