"""{"name": ..., "parameters": {...}} and nothing else, perhaps after <|python_tag|>: Llama 3."""

from __future__ import annotations

import json

from tiered.serve.tool_formats import ToolCall, ToolFormat, call_of


def matches(template: str) -> bool:
    return "<|python_tag|>" in template or '"parameters":' in template


def parse(text: str) -> list[ToolCall]:
    decoder, calls, text = json.JSONDecoder(), [], text.strip()
    while text:  # several calls stand after each other, with a semicolon
        value, end = decoder.raw_decode(text)
        calls.append(call_of(value, "parameters", "arguments"))
        text = text[end:].lstrip("; \n")
    return calls


def envelope(name: str) -> tuple[str, str]:
    return f'{{"name": {json.dumps(name)}, "parameters": ', "}"


FORMAT = ToolFormat("<|python_tag|>", "", parse, envelope, bare=True)
