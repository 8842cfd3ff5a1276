"""<tool_call>{"name": ..., "arguments": {...}}</tool_call>: Hermes, Qwen and many others."""

from __future__ import annotations

import json

from tiered.serve.tool_formats import ToolCall, ToolFormat, call_of


def matches(template: str) -> bool:
    return "<tool_call>" in template and "<function=" not in template


def parse(text: str) -> list[ToolCall]:
    return [call_of(json.loads(text), "arguments", "parameters")]


def envelope(name: str) -> tuple[str, str]:
    head = f'<tool_call>\n{{"name": {json.dumps(name)}, "arguments": '
    return head, "}\n</tool_call>"


FORMAT = ToolFormat("<tool_call>", "</tool_call>", parse, envelope)
