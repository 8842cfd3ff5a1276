"""<tool_call><function=NAME><parameter=KEY>VALUE</parameter>...: Qwen3-Coder."""

from __future__ import annotations

import json
import re
from typing import Any

from tiered.serve.tool_formats import ToolCall, ToolFormat

FUNCTION = re.compile(r"\s*<function=([^>\n]+)>(.*?)(?:</function>)?\s*", re.DOTALL)
PARAMETER = re.compile(r"<parameter=([^>\n]+)>\n?(.*?)\n?</parameter>", re.DOTALL)


def matches(template: str) -> bool:
    return "<tool_call>" in template and "<function=" in template


def parse(text: str) -> list[ToolCall]:
    function = FUNCTION.fullmatch(text)
    if function is None:
        raise ValueError("no <function=...> in a tool call")
    arguments = {key: _value(value) for key, value in PARAMETER.findall(function[2])}
    return [ToolCall(function[1].strip(), json.dumps(arguments, ensure_ascii=False))]


def _value(text: str) -> Any:
    """Values have no type here: what reads as JSON is JSON, the rest is text."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def envelope(name: str) -> tuple[str, str]:
    raise ValueError("this model does not write its tool calls as JSON: they cannot be enforced")


FORMAT = ToolFormat("<tool_call>", "</tool_call>", parse, envelope)
