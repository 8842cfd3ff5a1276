"""POST /v1/responses: OpenAI's newer interface, without a store of earlier responses."""

from __future__ import annotations

import asyncio
import time
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
from tiered.serve.fields import Fields
from tiered.serve.parts import Part
from tiered.serve.responding import respond, together, usage_of
from tiered.serve.response_items import CallItem, Item, ReasoningItem, TextItem
from tiered.serve.service import Service, max_tokens, new_id


async def endpoint(http: HttpRequest) -> Response:
    service, fields = await read_fields(http)
    service.check_model(fields)
    if fields.has("previous_response_id"):
        raise fields.wrong("previous_response_id", "is not kept here: send the whole conversation")
    wanted = fields.object("text", {}).get("format") or {}
    form = None
    if isinstance(wanted, dict) and wanted.get("type") in ("json_schema", "json_object"):
        schema = wanted.get("schema") if wanted["type"] == "json_schema" else {"type": "object"}
        form = schema_form(service, schema, "text.format")
    conversation = await prepare(service, fields, read_input(fields), response_tools(fields), form)
    constraint = None
    if conversation.new_constraint:
        constraint = await asyncio.to_thread(conversation.new_constraint)
    request = service.request(
        fields,
        conversation.ids,
        client_of(http),
        max_new_tokens=max_tokens(fields, "max_output_tokens", low=1),
        constraint=constraint,
    )
    (answer,) = together(service.scheduler, [request])
    response = ResponseAnswer(service, conversation, answer, fields)
    stream = fields.flag("stream")
    return await respond(http, stream, response.stream(), response.whole(), [answer])


def response_tools(fields: Fields) -> Tools:
    items = fields.items("tools", [])
    if not all(isinstance(item, dict) and item.get("type") == "function" for item in items):
        raise fields.wrong("tools", "must be functions: this server runs no tools of its own")
    choice = fields.get("tool_choice", "auto")
    if isinstance(choice, dict):
        choice = choice.get("name")
    if not isinstance(choice, str):
        raise fields.wrong("tool_choice", "must be auto, none, required or a function")
    return Tools(read_tools(items), choice, fields.flag("parallel_tool_calls", True))


def read_input(fields: Fields) -> list[dict[str, Any]]:
    """Input items as messages."""
    messages: list[dict[str, Any]] = []
    if fields.has("instructions"):
        messages.append({"role": "system", "content": fields.text("instructions")})
    given = fields.get("input")
    if isinstance(given, str):
        return [*messages, {"role": "user", "content": given}]
    if not isinstance(given, list):
        raise fields.wrong("input", "must be text or an array of items")
    for item in given:
        if not isinstance(item, dict):
            raise fields.wrong("input", "must hold objects")
        messages += read_item(fields, item)
    return messages


def read_item(fields: Fields, item: dict[str, Any]) -> list[dict[str, Any]]:
    match item.get("type", "message"):
        case "message":
            content = item.get("content")
            if isinstance(content, list):
                texts: list[Any] = [
                    part.get("text") if isinstance(part, dict) else None for part in content
                ]
                if not all(isinstance(text, str) for text in texts):
                    raise fields.wrong("input", "has content that is no text")
                content = "".join(texts)
            role = "system" if item.get("role") == "developer" else item.get("role")
            return [{"role": role, "content": content}]
        case "function_call":
            name = item.get("name")
            if not isinstance(name, str):
                raise fields.wrong("input", "has a function call without a name")
            id = str(item.get("call_id", ""))
            return [call_message([template_call(id, name, item.get("arguments", "{}"))])]
        case "function_call_output":
            output = item.get("output")
            if not isinstance(output, str):
                raise fields.wrong("input", "has a function's output that is no text")
            id = str(item.get("call_id", ""))
            return [{"role": "tool", "tool_call_id": id, "content": output}]
        case "reasoning":
            return []
        case kind:
            raise fields.wrong("input", f"has an item of type {kind!r}, which is not supported")


class ResponseAnswer:
    """One answer, whole or as events. Its items open and close as parts of each kind come."""

    def __init__(
        self, service: Service, conversation: Conversation, answer: Answer, fields: Fields
    ) -> None:
        self.answer = answer
        self.splitter = conversation.new_splitter()
        self.items: list[Item] = []
        self.head = {
            "id": new_id("resp_"),
            "object": "response",
            "created_at": int(time.time()),
            "model": service.name,
            "error": None,
            "incomplete_details": None,
            "instructions": fields.get("instructions"),
            "metadata": fields.object("metadata", {}),
            "parallel_tool_calls": fields.flag("parallel_tool_calls", True),
            "temperature": fields.number("temperature", 1.0, 0.0, 100.0),
            "tool_choice": fields.get("tool_choice", "auto"),
            "tools": fields.items("tools", []),
            "top_p": fields.number("top_p", 1.0, 0.0, 1.0),
        }

    async def whole(self) -> JSONResponse:
        async for _ in self.stream():
            pass
        return JSONResponse(self.body())

    def body(self) -> dict[str, Any]:
        """The response as it is now."""
        body = {**self.head, "status": "in_progress", "output": [], "usage": None}
        finish = self.answer.finish
        if finish is None:
            return body
        body["output"] = [item.body("completed") for item in self.items]
        body["status"] = "completed"
        if finish.reason == "length":
            body["status"] = "incomplete"
            body["incomplete_details"] = {"reason": "max_output_tokens"}
        usage = usage_of([finish])
        body["usage"] = {
            "input_tokens": usage["prompt_tokens"],
            "input_tokens_details": usage["prompt_tokens_details"],
            "output_tokens": usage["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": usage["total_tokens"],
        }
        return body

    async def stream(self) -> AsyncGenerator[tuple[str, dict[str, Any]], None]:
        number = 0
        async for name, data in self._events():
            yield name, {"type": name, "sequence_number": number, **data}
            number += 1

    async def _events(self) -> AsyncGenerator[tuple[str, dict[str, Any]], None]:
        yield "response.created", {"response": self.body()}
        yield "response.in_progress", {"response": self.body()}
        async for event in self.answer.events():
            for part in read_event(self.splitter, event):
                for change in self._add(part):
                    yield change
        if self.items:
            for change in self.items[-1].close():
                yield change
        ended = self.body()
        yield f"response.{ended['status']}", {"response": ended}

    def _add(self, part: Part) -> list[tuple[str, dict[str, Any]]]:
        changes = []
        if not self.items or part.call or self.items[-1].kind != part.kind:
            if self.items:
                changes += self.items[-1].close()
            kinds = {"text": TextItem, "reasoning": ReasoningItem, "call": CallItem}
            self.items.append(kinds[part.kind](len(self.items), part))
            changes += self.items[-1].open()
        return changes + self.items[-1].add(part)
