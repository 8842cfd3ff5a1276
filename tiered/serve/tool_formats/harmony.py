"""gpt-oss: a message to a function, which tiered.text.harmony rewrites to Hermes' form."""

from __future__ import annotations

from tiered.serve.tool_formats import ToolFormat
from tiered.serve.tool_formats.hermes import parse
from tiered.text.harmony import MARKS, is_harmony


def matches(template: str) -> bool:
    return is_harmony(template)


def envelope(name: str) -> tuple[str, str]:
    raise ValueError("gpt-oss's calls begin with control tokens: they cannot be enforced")


FORMAT = ToolFormat("<tool_call>", "</tool_call>", parse, envelope, control=MARKS)
