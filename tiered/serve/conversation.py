"""A conversation as token ids, with what is needed to read the answer: common to three APIs."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from tiered.serve.errors import ApiError
from tiered.serve.fields import Fields, clean
from tiered.serve.parts import THINK, Splitter
from tiered.serve.request import Constraint
from tiered.serve.service import Service
from tiered.serve.structured import AfterReasoning
from tiered.text.harmony import Harmony, is_harmony

MAX_TOOLS = 128
MAX_MESSAGES = 10_000
PLACEHOLDER = "\ue000{}\ue001"  # private characters of Unicode: a template passes them on


class Tools(NamedTuple):
    """What the model may call. `choice` is auto, none, required or the name of a tool."""

    specs: list[dict[str, Any]]  # each {"name", "description", "parameters"}
    choice: str = "auto"
    several: bool = True


class Conversation(NamedTuple):
    ids: list[int]
    new_splitter: Callable[[], Splitter]
    new_constraint: Callable[[], Constraint] | None  # one for each answer


async def prepare(
    service: Service,
    fields: Fields,
    messages: list[dict[str, Any]],
    tools: Tools,
    form: Callable[[], Constraint] | None,
) -> Conversation:
    """`form` makes the constraint that the client asked for; compiling one may take a moment."""
    if not 0 < len(messages) <= MAX_MESSAGES:
        raise ApiError(f"there must be 1 to {MAX_MESSAGES} messages", param="messages")
    offered = [] if tools.choice == "none" else tools.specs
    wrapped = [{"type": "function", "function": tool} for tool in offered]
    text, hidden = await asyncio.to_thread(
        _render, service, messages, wrapped or None, template_variables(fields)
    )
    ids = await asyncio.to_thread(encode_hidden, service, text, hidden)
    thinking, harmony = None, is_harmony(service.tokenizer.chat_template)
    if harmony:
        thinking = False
    elif THINK in (service.tokenizer.chat_template or ""):
        thinking = text.rstrip().endswith(THINK)
    format = service.tools if offered else None
    if offered and tools.choice != "auto":
        form = _forced_call(service, tools)
    new_constraint = form
    if form is not None and thinking:
        inner = form

        def new_constraint() -> Constraint:
            return AfterReasoning(inner(), service.tokenizer)

    return Conversation(
        ids, lambda: Splitter(thinking, format, Harmony() if harmony else None), new_constraint
    )


def template_variables(fields: Fields) -> dict[str, Any]:
    """Variables for the template: plain values only, and none that the template already has."""
    variables: dict[str, Any] = fields.object("chat_template_kwargs", {})
    for name, value in variables.items():
        if not name.isidentifier() or not isinstance(value, (str, bool, int, float, type(None))):
            raise fields.wrong("chat_template_kwargs", "must map names to plain values")
        if name in ("messages", "tools", "bos_token", "eos_token", "add_generation_prompt"):
            raise fields.wrong("chat_template_kwargs", f"must not set {name}")
    return variables


def _forced_call(service: Service, tools: Tools) -> Callable[[], Constraint]:
    if service.tools is None:
        raise ApiError("this model's template knows no tools", 501, param="tool_choice")
    allowed = [
        tool for tool in tools.specs if tools.choice == "required" or tool["name"] == tools.choice
    ]
    if not allowed:
        raise ApiError(f"tool_choice names no tool: {tools.choice!r}", param="tool_choice")
    several = tools.several and tools.choice == "required"
    format = service.tools
    return lambda: service.grammars.tool_call(format, allowed, several)


def _render(
    service: Service,
    messages: Sequence[dict[str, Any]],
    tools: list[dict[str, Any]] | None,
    variables: dict[str, Any],
) -> tuple[str, list[str]]:
    """The text, and the names of control tokens that were hidden in it by placeholders."""
    hidden: list[str] = []

    def hide(match: re.Match[str]) -> str:
        hidden.append(match[0])
        return PLACEHOLDER.format(len(hidden) - 1)

    return service.render(_hide(messages, service.control_names, hide), tools, **variables), hidden


def _hide(value: Any, names: re.Pattern[str], hide: Callable[[re.Match[str]], str]) -> Any:
    """A copy in which no text names a control token: a message must not be able to end itself."""
    if isinstance(value, str):
        return names.sub(hide, clean(value))
    if isinstance(value, list):
        return [_hide(item, names, hide) for item in value]
    if isinstance(value, dict):
        return {key: _hide(item, names, hide) for key, item in value.items()}
    return value


def encode_hidden(service: Service, text: str, hidden: list[str]) -> list[int]:
    """Token ids; what was hidden becomes plain text, letter by letter."""
    pieces = re.split(PLACEHOLDER.format(r"(\d{1,6})"), text) if hidden else [text]
    ids = service.encode(pieces[0])
    for number, following in zip(pieces[1::2], pieces[2::2], strict=True):
        if int(number) < len(hidden):
            ids += service.encode(hidden[int(number)], add_bos=False, parse_special=False)
        ids += service.encode(following, add_bos=False)
    return ids


def read_tools(items: Sequence[Any], parameters: str = "parameters") -> list[dict[str, Any]]:
    """Tools as {"name", "description", "parameters"}, whatever an API calls the schema."""
    if len(items) > MAX_TOOLS:
        raise ApiError(f"there must be at most {MAX_TOOLS} tools", param="tools")
    tools = []
    for item in items:
        if not isinstance(item, dict) or not isinstance(item.get("name"), str) or not item["name"]:
            raise ApiError("each tool needs a name", param="tools")
        schema = item.get(parameters) or {"type": "object", "properties": {}}
        if not isinstance(schema, dict):
            raise ApiError(f"a tool's {parameters} must be a JSON schema", param="tools")
        description = item.get("description") or ""
        tools.append({"name": item["name"], "description": description, "parameters": schema})
    return tools


def call_message(calls: list[dict[str, Any]], content: str = "") -> dict[str, Any]:
    """An assistant's message with tool calls, as templates expect it."""
    return {"role": "assistant", "content": content, "tool_calls": calls}


def template_call(id: str, name: str, arguments: Any) -> dict[str, Any]:
    """A tool call of an earlier turn; templates want its arguments as an object."""
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except ValueError:
            raise ApiError("a tool call's arguments must be JSON", param="messages") from None
    return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}


def output_form(service: Service, fields: Fields) -> Callable[[], Constraint] | None:
    """The form that response_format, or one of vLLM's and llama.cpp's fields, asks for."""
    kind = fields.object("response_format", {})
    if kind.get("type") == "json_schema":
        schema = kind.get("json_schema")
        inner = schema.get("schema", {}) if isinstance(schema, dict) else None
        return schema_form(service, inner, "response_format")
    if kind.get("type") == "json_object":
        return schema_form(service, {"type": "object"}, "response_format")
    if kind and kind.get("type") != "text":
        raise fields.wrong("response_format", "must be of type text, json_object or json_schema")
    options = Fields(fields.object("structured_outputs", {}), "structured_outputs.")
    if options.has("json"):
        return schema_form(service, options.get("json"), "structured_outputs.json")
    grammars = service.grammars
    if options.has("regex"):
        pattern = options.text("regex")
        return lambda: grammars.regex(pattern)
    for holder in (options, fields):
        if holder.has("grammar"):
            grammar = holder.text("grammar")
            return lambda: grammars.lark(grammar)
    if options.has("choice"):
        texts = options.items("choice")
        if not texts or not all(isinstance(text, str) and text for text in texts):
            raise options.wrong("choice", "must be strings, none empty")
        return lambda: grammars.choice(texts)
    return None


def schema_form(service: Service, schema: Any, name: str) -> Callable[[], Constraint]:
    if isinstance(schema, str):
        schema = Fields.parse(schema.encode()).values
    if not isinstance(schema, dict):
        raise ApiError(f"{name} must hold a JSON schema", param=name)
    return lambda: service.grammars.json_schema(schema)
