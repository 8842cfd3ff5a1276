"""What every endpoint does first: read the body, within limits."""

from __future__ import annotations

import hashlib

from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest

from tiered.serve.errors import ApiError
from tiered.serve.fields import Fields
from tiered.serve.service import Service


def service_of(http: HttpRequest) -> Service:
    service: Service = http.app.state.service
    return service


async def read_fields(http: HttpRequest) -> tuple[Service, Fields]:
    """The service, and the fields of the request's JSON."""
    service = service_of(http)
    if service.draining:
        raise ApiError("the server is shutting down", 503)
    return service, Fields.parse(await read_body(http, service.limits.body_bytes))


async def read_body(http: HttpRequest, limit: int) -> bytes:
    too_large = ApiError(f"the body is larger than {limit} bytes", 413)
    length = http.headers.get("content-length", "0")
    if length.isdigit() and int(length) > limit:
        raise too_large
    body = bytearray()
    try:
        async for chunk in http.stream():
            body += chunk
            if len(body) > limit:
                raise too_large
    except ClientDisconnect:
        raise ApiError("the client went away") from None
    return bytes(body)


def client_of(http: HttpRequest) -> str:
    """For whose account a request is: its key, or else the address it comes from."""
    key = http.headers.get("authorization") or http.headers.get("x-api-key")
    if key:
        return hashlib.sha256(key.encode()).hexdigest()
    return http.client.host if http.client else ""
