"""The fields of a JSON request: each is asked for once, with its type and limits."""

from __future__ import annotations

import json
import math
from typing import Any

from tiered.serve.errors import ApiError

MISSING: Any = object()


class Fields:
    """A JSON object from a client. null counts as not given; what nobody asks for is ignored."""

    def __init__(self, values: dict[str, Any], prefix: str = "") -> None:
        self.values = values
        self.prefix = prefix

    @staticmethod
    def parse(body: bytes) -> Fields:
        try:
            values = json.loads(body, parse_constant=_no_constant)
        except (ValueError, RecursionError) as error:
            raise ApiError(f"the body is not valid JSON: {error}") from None
        if not isinstance(values, dict):
            raise ApiError("the body must be a JSON object")
        return Fields(values)

    def has(self, name: str) -> bool:
        return self.values.get(name) is not None

    def get(self, name: str, default: Any = None) -> Any:
        """The value as it is, unchecked."""
        value = self.values.get(name)
        return default if value is None else value

    def wrong(self, name: str, message: str) -> ApiError:
        return ApiError(f"{self.prefix}{name} {message}", param=self.prefix + name)

    def _typed(self, name: str, default: Any, kind: Any, what: str) -> Any:
        value = self.values.get(name)
        if value is None:
            if default is MISSING:
                raise self.wrong(name, "is missing")
            return default
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise self.wrong(name, f"must be {what}")
        return value

    def text(self, name: str, default: Any = MISSING) -> Any:
        value = self._typed(name, default, str, "a string")
        return clean(value) if isinstance(value, str) else value

    def flag(self, name: str, default: bool = False) -> bool:
        return bool(self._typed(name, default, bool, "true or false"))

    def items(self, name: str, default: Any = MISSING) -> Any:
        return self._typed(name, default, list, "an array")

    def object(self, name: str, default: Any = MISSING) -> Any:
        return self._typed(name, default, dict, "an object")

    def integer(self, name: str, default: Any = MISSING, low: int = 0, high: int = 2**31) -> Any:
        value = self._typed(name, default, (int, float), "an integer")
        if value is default:
            return value
        if value != value or (isinstance(value, float) and not value.is_integer()):
            raise self.wrong(name, "must be an integer")
        if not low <= value <= high:
            raise self.wrong(name, f"must lie in {low} ... {high}")
        return int(value)

    def number(self, name: str, default: Any, low: float, high: float = math.inf) -> Any:
        value = self._typed(name, default, (int, float), "a number")
        if value is default:
            return value
        if not low <= value <= high or abs(value) > 1e30:
            raise self.wrong(name, f"must lie in {low:g} ... {high:g}")
        return float(value)


def clean(text: str) -> str:
    """The text, or an error if it holds half a surrogate pair, which has no UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ApiError("a string in the request is not valid Unicode") from None
    return text


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")
