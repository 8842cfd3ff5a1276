"""The HTTP interface: which path is what, who may call it, and what becomes of errors."""

from __future__ import annotations

import hmac
import logging
from collections.abc import Sequence

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from tiered.serve import (
    chat_completions,
    completions,
    embeddings,
    messages,
    model_endpoints,
    page_endpoints,
    responses,
)
from tiered.serve.errors import ApiError, error_response
from tiered.serve.service import Service

log = logging.getLogger("tiered")
OPEN_PATHS = ("/", "/health")  # without a key: the page asks for it

ROUTES = [
    Route("/", page_endpoints.page),
    Route("/live", page_endpoints.live),
    Route("/settings", page_endpoints.settings, methods=["GET", "POST"]),
    Route("/health", model_endpoints.health),
    Route("/metrics", model_endpoints.metrics),
    Route("/v1/models", model_endpoints.models),
    Route("/v1/models/{name:path}", model_endpoints.models),
    Route("/v1/chat/completions", chat_completions.endpoint, methods=["POST"]),
    Route("/v1/completions", completions.endpoint, methods=["POST"]),
    Route("/v1/responses", responses.endpoint, methods=["POST"]),
    Route("/v1/messages", messages.endpoint, methods=["POST"]),
    Route("/v1/messages/count_tokens", messages.count_tokens, methods=["POST"]),
    Route("/v1/embeddings", embeddings.endpoint, methods=["POST"]),
    Route("/tokenizer_info", model_endpoints.tokenizer_info),
    Route("/tokenize", model_endpoints.tokenize, methods=["POST"]),
    Route("/detokenize", model_endpoints.detokenize, methods=["POST"]),
]


def make_app(
    service: Service, api_keys: Sequence[str] = (), allowed_origins: Sequence[str] = ()
) -> Starlette:
    """An ASGI application. With `api_keys`, one of them must come with every request; pages of
    `allowed_origins` may call it from a browser."""
    middleware = [Middleware(KeyCheck, keys=tuple(api_keys))]
    if allowed_origins:
        cors = Middleware(
            CORSMiddleware,
            allow_origins=list(allowed_origins),
            allow_methods=["*"],
            allow_headers=["*"],
        )
        middleware.insert(0, cors)
    app = Starlette(
        routes=ROUTES,
        middleware=middleware,
        exception_handlers={
            ApiError: _api_error,  # type: ignore[dict-item]
            HTTPException: _http_error,  # type: ignore[dict-item]
            Exception: _unexpected,
        },
    )
    app.state.service = service
    return app


class KeyCheck:
    """Lets requests with a key through: `Authorization: Bearer KEY`, or `x-api-key: KEY`."""

    def __init__(self, app: ASGIApp, keys: Sequence[str]) -> None:
        self.app = app
        self.keys = [key.encode() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and self.keys and scope["path"] not in OPEN_PATHS:
            headers = dict(scope["headers"])
            given = headers.get(b"x-api-key", b"")
            kind, _, token = headers.get(b"authorization", b"").partition(b" ")
            if kind.lower() == b"bearer":
                given = token.strip()
            if not any(hmac.compare_digest(given, key) for key in self.keys):
                error = ApiError("a valid API key is needed", 401, code="invalid_api_key")
                await error_response(error, scope["path"])(scope, receive, send)
                return
        await self.app(scope, receive, send)


async def _api_error(http: HttpRequest, error: ApiError) -> Response:
    return error_response(error, http.url.path)


async def _http_error(http: HttpRequest, error: HTTPException) -> Response:
    message = f"{http.method} {http.url.path}: {error.detail}"
    return error_response(ApiError(message, error.status_code), http.url.path)


async def _unexpected(http: HttpRequest, error: Exception) -> Response:
    return error_response(ApiError("an error of the server: see its log", 500), http.url.path)
