"""[TOOL_CALLS][{"name": ..., "arguments": {...}}], or [TOOL_CALLS]NAME[ARGS]{...}: Mistral."""

from __future__ import annotations

import json

from tiered.serve.tool_formats import ToolCall, ToolFormat, call_of


def matches(template: str) -> bool:
    return "[TOOL_CALLS]" in template


def parse(text: str) -> list[ToolCall]:
    text = text.strip()
    if text.startswith("["):
        return [call_of(value, "arguments") for value in json.loads(text)]
    calls = []
    for part in text.split("[TOOL_CALLS]"):
        name, _, arguments = part.partition("[ARGS]")
        name = name.removesuffix("[CALL_ID]").strip()
        calls.append(call_of({"name": name, "arguments": json.loads(arguments)}, "arguments"))
    return calls


def envelope(name: str) -> tuple[str, str]:
    return f'[TOOL_CALLS][{{"name": {json.dumps(name)}, "arguments": ', "}]"


FORMAT = ToolFormat("[TOOL_CALLS]", "", parse, envelope)
