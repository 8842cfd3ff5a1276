"""POST /v1/chat/completions"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from tiered.serve.answer import Answer
from tiered.serve.conversation import (
    Conversation,
    Tools,
    call_message,
    output_form,
    prepare,
    read_tools,
    template_call,
)
from tiered.serve.endpoint import client_of, read_fields
from tiered.serve.errors import ApiError
from tiered.serve.fields import Fields
from tiered.serve.parts import Part, Splitter
from tiered.serve.request import Choice, Finish, Piece
from tiered.serve.responding import respond, together, usage_of
from tiered.serve.service import Service, max_tokens, new_id


async def endpoint(http: HttpRequest) -> Response:
    service, fields = await read_fields(http)
    service.check_model(fields)
    tools = chat_tools(fields)
    conversation = await prepare(
        service, fields, chat_messages(fields), tools, output_form(service, fields)
    )
    logprobs = None
    if fields.flag("logprobs"):
        logprobs = fields.integer("top_logprobs", 0, 0, service.limits.logprobs)
    answers = await open_answers(service, fields, conversation, client_of(http), logprobs)
    chat = Chat(service, conversation, answers, fields)
    return await respond(http, fields.flag("stream"), chat.stream(), chat.whole(), answers)


async def open_answers(
    service: Service, fields: Fields, conversation: Conversation, client: str, logprobs: int | None
) -> list[Answer]:
    requests = []
    for choice in range(service.num_choices(fields)):
        constraint = None
        if conversation.new_constraint:
            constraint = await asyncio.to_thread(conversation.new_constraint)
        requests.append(
            service.request(
                fields,
                conversation.ids,
                client,
                max_new_tokens=max_tokens(fields, "max_completion_tokens", "max_tokens", low=1),
                stop=service.stop_strings(fields),
                logprobs=logprobs,
                constraint=constraint,
                choice=choice,
            )
        )
    return together(service.scheduler, requests)


def chat_messages(fields: Fields) -> list[dict[str, Any]]:
    messages = []
    for item in fields.items("messages"):
        if not isinstance(item, dict):
            raise fields.wrong("messages", "must be objects")
        message = {key: value for key, value in item.items() if value is not None}
        if message.get("role") == "developer":
            message["role"] = "system"
        if "tool_calls" in message:
            calls = Fields(message).items("tool_calls")
            read = []
            for call in calls:
                function = call.get("function") if isinstance(call, dict) else None
                if not isinstance(function, dict) or not isinstance(function.get("name"), str):
                    raise fields.wrong("messages", "has a tool call without a function's name")
                arguments = function.get("arguments", "{}")
                read.append(template_call(str(call.get("id", "")), function["name"], arguments))
            message = {**call_message(read), **message, "tool_calls": read}
        messages.append(message)
    return messages


def chat_tools(fields: Fields) -> Tools:
    items = fields.items("tools", [])
    functions = [item.get("function") if isinstance(item, dict) else None for item in items]
    choice = fields.get("tool_choice", "auto")
    if isinstance(choice, dict):
        function = choice.get("function")
        choice = function.get("name") if isinstance(function, dict) else None
        if not isinstance(choice, str):
            raise fields.wrong("tool_choice", "must name a function")
    elif choice not in ("auto", "none", "required"):
        raise fields.wrong("tool_choice", "must be auto, none, required or a function")
    return Tools(read_tools(functions), choice, fields.flag("parallel_tool_calls", True))


class Chat:
    """The answers to one request, whole or as they come."""

    def __init__(
        self, service: Service, conversation: Conversation, answers: list[Answer], fields: Fields
    ) -> None:
        self.service = service
        self.answers = answers
        self.splitters = [conversation.new_splitter() for _ in answers]
        options = fields.object("stream_options", {})
        self.with_usage = options.get("include_usage") is True
        self.head = {
            "id": new_id("chatcmpl-"),
            "object": "chat.completion",
            "created": int(time.time()),
            "model": service.name,
        }

    async def whole(self) -> JSONResponse:
        choices = await asyncio.gather(*map(self._choice, range(len(self.answers))))
        usage = usage_of([answer.finish for answer in self.answers])
        return JSONResponse({**self.head, "choices": choices, "usage": usage})

    async def _choice(self, index: int) -> dict[str, Any]:
        splitter, parts, scores = self.splitters[index], list[Part](), list[dict[str, Any]]()
        async for event in self.answers[index].events():
            parts += read_event(splitter, event)
            if isinstance(event, Piece) and event.choice:
                scores.append(self.logprob(event.choice))
            if isinstance(event, Finish):
                reason = finish_reason(event, splitter)
        text = "".join(part.text for part in parts if part.kind == "text")
        reasoning = "".join(part.text for part in parts if part.kind == "reasoning")
        calls = [tool_call(part) for part in parts if part.call]
        message: dict[str, Any] = {"role": "assistant", "content": text or (None if calls else "")}
        if reasoning:
            message["reasoning_content"] = reasoning
        if calls:
            message["tool_calls"] = calls
        wanted = self.answers[index].request.logprobs is not None
        return {
            "index": index,
            "message": message,
            "logprobs": {"content": scores} if wanted else None,
            "finish_reason": reason,
        }

    async def stream(self) -> AsyncGenerator[dict[str, Any] | str, None]:
        self.head["object"] = "chat.completion.chunk"
        for index in range(len(self.answers)):
            yield self._chunk(index, {"role": "assistant", "content": ""})
        num_calls = [0] * len(self.answers)
        async for index, event in merged(self.answers):
            splitter = self.splitters[index]
            deltas = []
            for part in read_event(splitter, event):
                deltas.append(delta(part, num_calls[index]))
                num_calls[index] += part.call is not None
            scores = None
            if isinstance(event, Piece) and event.choice:
                scores = {"content": [self.logprob(event.choice)]}
                deltas = deltas or [{"content": ""}]
            for position, change in enumerate(deltas):
                yield self._chunk(index, change, scores if not position else None)
            if isinstance(event, Finish):
                yield self._chunk(index, {}, reason=finish_reason(event, splitter))
        if self.with_usage:
            usage = usage_of([answer.finish for answer in self.answers])
            yield {**self.head, "choices": [], "usage": usage}
        yield "[DONE]"

    def _chunk(
        self, index: int, delta: dict[str, Any], scores: Any = None, reason: str | None = None
    ) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": scores, "finish_reason": reason}
        return {**self.head, "choices": [choice]} | ({"usage": None} if self.with_usage else {})

    def logprob(self, choice: Choice) -> dict[str, Any]:
        def entry(token: int, logprob: float) -> dict[str, Any]:
            data = self.service.tokenizer.token_bytes(token)
            text = data.decode(errors="replace")
            return {"token": text, "logprob": max(logprob, -9999.0), "bytes": list(data)}

        alternatives = [entry(*pair) for pair in choice.alternatives]
        return {**entry(choice.token, choice.logprob), "top_logprobs": alternatives}


def read_event(splitter: Splitter, event: Any) -> list[Part]:
    """The parts that an event completes."""
    if isinstance(event, Finish):
        return splitter.push(event.text) + splitter.finish()
    return splitter.push(event.text) if isinstance(event, Piece) else []


def finish_reason(finish: Finish, splitter: Splitter) -> str:
    return "tool_calls" if finish.reason == "stop" and splitter.num_calls else finish.reason


def tool_call(part: Part) -> dict[str, Any]:
    if part.call is None:
        raise ApiError("no call", 500)
    return {"id": new_id("call_"), "type": "function", "function": part.call._asdict()}


def delta(part: Part, position: int) -> dict[str, Any]:
    if part.call:
        return {"tool_calls": [{"index": position, **tool_call(part)}]}
    return {"reasoning_content" if part.kind == "reasoning" else "content": part.text}


async def merged(answers: list[Answer]) -> AsyncGenerator[tuple[int, Any], None]:
    """The events of several answers as they come, each with its answer's position."""
    if len(answers) == 1:
        async for event in answers[0].events():
            yield 0, event
        return
    queue: asyncio.Queue[Any] = asyncio.Queue()

    async def forward(index: int, answer: Answer) -> None:
        try:
            async for event in answer.events():
                queue.put_nowait((index, event))
        except Exception as error:
            queue.put_nowait((index, error))

    tasks = [asyncio.ensure_future(forward(i, a)) for i, a in enumerate(answers)]
    try:
        left = len(tasks)
        while left:
            index, event = await queue.get()
            if isinstance(event, Exception):
                raise event
            left -= isinstance(event, Finish)
            yield index, event
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
