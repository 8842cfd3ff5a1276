"""How models write tool calls: one file for each way, found by what the chat template contains."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib import import_module
from pkgutil import iter_modules
from typing import Any, NamedTuple


class ToolCall(NamedTuple):
    """A call that a model wrote; `arguments` is JSON text, as the APIs hand it on."""

    name: str
    arguments: str


class ToolFormat(NamedTuple):
    """`opening` and `closing` (empty: the answer's end) enclose what `parse` reads.

    `bare`: an answer that begins with a brace may be a call without `opening`. `envelope` gives
    what stands before and after the JSON arguments of a call to a tool of this name; ValueError if
    that cannot be enforced. `control` are control tokens that tell an answer's parts apart.
    """

    opening: str
    closing: str
    parse: Callable[[str], list[ToolCall]]  # ValueError: that is not a call
    envelope: Callable[[str], tuple[str, str]]
    bare: bool = False
    control: tuple[str, ...] = ()

    @property
    def marks(self) -> tuple[str, ...]:
        return tuple(mark for mark in (self.opening, self.closing, *self.control) if mark)


def find_format(template: str) -> ToolFormat | None:
    """The format that a chat template writes; None if it knows no tools."""
    for module in sorted(iter_modules(__path__)):
        loaded = import_module(f"{__name__}.{module.name}")
        if loaded.matches(template):
            found: ToolFormat = loaded.FORMAT
            return found
    return None


def call_of(value: Any, *argument_keys: str) -> ToolCall:
    """The call that a JSON object spells."""
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        raise ValueError("a tool call is an object with a name")
    arguments: Any = next((value[key] for key in argument_keys if key in value), {})
    if isinstance(arguments, str):
        arguments = json.loads(arguments)
    if not isinstance(arguments, dict):
        raise ValueError("a tool call's arguments are an object")
    return ToolCall(value["name"], json.dumps(arguments, ensure_ascii=False))
