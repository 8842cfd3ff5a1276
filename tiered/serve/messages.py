"""POST /v1/messages: Anthropic's interface."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from tiered.serve.answer import Answer
from tiered.serve.chat_completions import read_event
from tiered.serve.conversation import (
    Conversation,
    Tools,
    call_message,
    prepare,
    read_tools,
    schema_form,
    template_call,
)
from tiered.serve.endpoint import client_of, read_fields
from tiered.serve.fields import MISSING, Fields
from tiered.serve.parts import Part, Splitter
from tiered.serve.request import Finish
from tiered.serve.responding import respond, together
from tiered.serve.service import Service, max_tokens, new_id

BLOCKS = {"text": "text", "reasoning": "thinking", "call": "tool_use"}


async def endpoint(http: HttpRequest) -> Response:
    service, fields = await read_fields(http)
    service.check_model(fields)
    conversation = await prepare(service, fields, *conversation_of(service, fields))
    constraint = None
    if conversation.new_constraint:
        constraint = await asyncio.to_thread(conversation.new_constraint)
    request = service.request(
        fields,
        conversation.ids,
        client_of(http),
        max_new_tokens=max_tokens(fields, "max_tokens", default=MISSING, low=1),
        stop=service.stop_strings(fields, "stop_sequences"),
        constraint=constraint,
    )
    (answer,) = together(service.scheduler, [request])
    message = MessageAnswer(service, conversation, answer)
    stream = fields.flag("stream")
    return await respond(http, stream, message.stream(), message.whole(), [answer])


async def count_tokens(http: HttpRequest) -> Response:
    service, fields = await read_fields(http)
    service.check_model(fields)
    conversation = await prepare(service, fields, *conversation_of(service, fields))
    return JSONResponse({"input_tokens": len(conversation.ids)})


def conversation_of(service: Service, fields: Fields) -> tuple[list[dict[str, Any]], Tools, Any]:
    form = None
    wanted = fields.object("output_config", {}).get("format") or fields.object("output_format", {})
    if isinstance(wanted, dict) and wanted.get("type") == "json_schema":
        form = schema_form(service, wanted.get("schema"), "output_config")
    return read_messages(fields), message_tools(fields), form


def message_tools(fields: Fields) -> Tools:
    choice = Fields(fields.object("tool_choice", {}), "tool_choice.")
    kind = choice.text("type", "auto")
    names = {"auto": "auto", "none": "none", "any": "required"}
    if kind not in (*names, "tool"):
        raise fields.wrong("tool_choice", "must be of type auto, any, tool or none")
    specs = read_tools(fields.items("tools", []), "input_schema")
    name = choice.text("name") if kind == "tool" else names[kind]
    return Tools(specs, name, not choice.flag("disable_parallel_tool_use"))


def read_messages(fields: Fields) -> list[dict[str, Any]]:
    """Anthropic's messages as chat templates expect them."""
    messages: list[dict[str, Any]] = []
    if fields.has("system"):
        messages.append({"role": "system", "content": text_of(fields, fields.get("system"))})
    for item in fields.items("messages"):
        if not isinstance(item, dict) or item.get("role") not in ("user", "assistant", "system"):
            raise fields.wrong("messages", "must be objects with role user or assistant")
        content = item.get("content")
        blocks = content if isinstance(content, list) else [{"type": "text", "text": content}]
        messages += read_blocks(fields, item["role"], blocks)
    return messages


def read_blocks(fields: Fields, role: str, blocks: list[Any]) -> list[dict[str, Any]]:
    messages, texts, thoughts = list[dict[str, Any]](), list[str](), list[str]()
    calls: list[dict[str, Any]] = []
    for block in blocks:
        kind = block.get("type") if isinstance(block, dict) else None
        if kind == "text":
            texts.append(text_of(fields, [block]))
        elif kind in ("thinking", "redacted_thinking"):
            thoughts.append(str(block.get("thinking", "")))
        elif kind == "tool_use" and isinstance(block.get("name"), str):
            call = template_call(str(block.get("id", "")), block["name"], block.get("input") or {})
            calls.append(call)
        elif kind == "tool_result":
            text = text_of(fields, block.get("content") or "")
            id = str(block.get("tool_use_id", ""))
            messages.append({"role": "tool", "tool_call_id": id, "content": text})
        else:
            raise fields.wrong("messages", f"has a block of type {kind!r}: only text is supported")
    text = "".join(texts)
    if calls:
        messages.append(call_message(calls, text))
    elif text or not messages:
        messages.append({"role": role, "content": text})
    if any(thoughts):
        messages[-1]["reasoning_content"] = "".join(thoughts)
    return messages


def text_of(fields: Fields, content: Any) -> str:
    """The text of a string, or of a list of text blocks."""
    blocks = [{"text": content}] if isinstance(content, str) else content
    texts = [b.get("text") if isinstance(b, dict) else None for b in blocks or []]
    if not isinstance(content, (str, list)) or not all(isinstance(text, str) for text in texts):
        raise fields.wrong("messages", "must have text as content")
    return "".join(texts)  # type: ignore[arg-type]


class MessageAnswer:
    """One answer, whole or as Anthropic's events."""

    def __init__(self, service: Service, conversation: Conversation, answer: Answer) -> None:
        self.answer = answer
        self.splitter: Splitter = conversation.new_splitter()
        self.message: dict[str, Any] = {
            "id": new_id("msg_"),
            "type": "message",
            "role": "assistant",
            "model": service.name,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": {"input_tokens": len(conversation.ids), "output_tokens": 0},
        }

    async def whole(self) -> JSONResponse:
        blocks: list[dict[str, Any]] = []
        async for event in self.answer.events():
            for part in read_event(self.splitter, event):
                kind = BLOCKS[part.kind]
                if part.call or not blocks or blocks[-1]["type"] != kind:
                    blocks.append(self.block(part))
                if part.call:
                    blocks[-1]["input"] = json.loads(part.call.arguments)
                else:
                    blocks[-1][kind] += part.text
        return JSONResponse(
            {**self.message, "content": blocks, **self.ending(), "usage": self.usage()}
        )

    async def stream(self) -> AsyncGenerator[tuple[str, dict[str, Any]], None]:
        yield named("message_start", message=self.message)
        index, kind = -1, ""  # of the open block
        async for event in self.answer.events():
            for part in read_event(self.splitter, event):
                if part.kind != kind or part.call:
                    if kind:
                        yield named("content_block_stop", index=index)
                    index, kind = index + 1, part.kind
                    yield named("content_block_start", index=index, content_block=self.block(part))
                yield named("content_block_delta", index=index, delta=block_delta(part))
        if kind:
            yield named("content_block_stop", index=index)
        yield named("message_delta", delta=self.ending(), usage=self.usage())
        yield named("message_stop")

    def block(self, part: Part) -> dict[str, Any]:
        """An empty block for this part."""
        if part.call:
            return {"type": "tool_use", "id": new_id("toolu_"), "name": part.call.name, "input": {}}
        kind = BLOCKS[part.kind]
        return {"type": kind, kind: "", **({"signature": ""} if kind == "thinking" else {})}

    def ending(self) -> dict[str, Any]:
        finish = self.finish()
        reason = {"length": "max_tokens", "stop": "end_turn"}[finish.reason]
        if finish.stop is not None:
            reason = "stop_sequence"
        elif finish.reason == "stop" and self.splitter.num_calls:
            reason = "tool_use"
        return {"stop_reason": reason, "stop_sequence": finish.stop}

    def usage(self) -> dict[str, int]:
        finish = self.finish()
        return {
            "input_tokens": finish.num_prompt - finish.num_cached,
            "cache_read_input_tokens": finish.num_cached,
            "cache_creation_input_tokens": 0,
            "output_tokens": finish.num_new,
        }

    def finish(self) -> Finish:
        assert self.answer.finish is not None
        return self.answer.finish


def block_delta(part: Part) -> dict[str, Any]:
    if part.call:
        return {"type": "input_json_delta", "partial_json": part.call.arguments}
    kind = BLOCKS[part.kind]
    return {"type": f"{kind}_delta", kind: part.text}


def named(name: str, **data: Any) -> tuple[str, dict[str, Any]]:
    return name, {"type": name, **data}
