"""Errors as clients of either API expect them."""

from __future__ import annotations

from typing import Any

from starlette.responses import JSONResponse

OPENAI_TYPES = {
    401: "authentication_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: "server_error",
    501: "not_supported_error",
    503: "overloaded_error",
    504: "timeout_error",
}
ANTHROPIC_TYPES = {
    401: "authentication_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    500: "api_error",
    503: "overloaded_error",
    504: "timeout_error",
}


class ApiError(ValueError):
    """What is wrong with a request, with its HTTP status; `param` names the field."""

    def __init__(
        self, message: str, status: int = 400, *, code: str | None = None, param: str | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.param = param


def error_body(error: ApiError, path: str) -> dict[str, Any]:
    """The error as the API of this path spells it."""
    if path.startswith("/v1/messages"):
        kind = ANTHROPIC_TYPES.get(error.status, "invalid_request_error")
        return {"type": "error", "error": {"type": kind, "message": str(error)}}
    return {
        "error": {
            "message": str(error),
            "type": OPENAI_TYPES.get(error.status, "invalid_request_error"),
            "param": error.param,
            "code": error.code,
        }
    }


def error_response(error: ApiError, path: str) -> JSONResponse:
    headers = {}
    if error.status in (429, 503):
        headers["Retry-After"] = "1"
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(error_body(error, path), error.status, headers)
