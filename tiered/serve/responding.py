"""From answers to HTTP responses, whole or as a stream of events."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Coroutine, Sequence
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from tiered.serve.answer import Answer
from tiered.serve.errors import ApiError, error_body
from tiered.serve.request import Finish, Request
from tiered.serve.scheduler import Scheduler
from tiered.serve.sse import EventStream, event, unless_gone

log = logging.getLogger("tiered")


def together(scheduler: Scheduler, requests: Sequence[Request]) -> list[Answer]:
    """Queue all of them, or none."""
    answers: list[Answer] = []
    try:
        for request in requests:
            answers.append(Answer(scheduler, request).submit())
    except BaseException:
        close_all(answers)
        raise
    return answers


def close_all(answers: Sequence[Answer]) -> None:
    for answer in answers:
        answer.close()


async def respond(
    http: HttpRequest,
    as_stream: bool,
    stream: AsyncGenerator[Any, None],
    whole: Coroutine[Any, Any, Response],
    answers: Sequence[Answer] = (),
) -> Response:
    """The one response or the other; if the client goes away the answers are cancelled."""
    if as_stream:
        whole.close()
        return EventStream(written(stream, http.url.path, answers))  # type: ignore[return-value]
    try:
        response = await unless_gone(http.receive, whole)
    finally:
        close_all(answers)
    return response if response is not None else Response(status_code=499)


async def written(
    items: AsyncGenerator[Any, None], path: str, answers: Sequence[Answer] = ()
) -> AsyncGenerator[bytes, None]:
    """Events as bytes. An item is its data, or a pair of a name and data."""
    try:
        async for item in items:
            yield event(item[1], item[0]) if isinstance(item, tuple) else event(item)
    except Exception as error:
        if not isinstance(error, ApiError):
            log.exception("a stream failed")
            error = ApiError(f"the request failed: {error}", 500)
        named = "error" if path.startswith("/v1/messages") else None
        yield event(error_body(error, path), named)
    finally:
        await items.aclose()
        close_all(answers)


def usage_of(finishes: Sequence[Finish | None]) -> dict[str, Any]:
    """OpenAI's usage. Several answers to one prompt count it once."""
    ended = [finish for finish in finishes if finish is not None]
    prompt = ended[0].num_prompt if ended else 0
    new = sum(finish.num_new for finish in ended)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": new,
        "total_tokens": prompt + new,
        "prompt_tokens_details": {"cached_tokens": ended[0].num_cached if ended else 0},
    }
