"""POST /v1/completions: text or token ids go on, perhaps with their own log-probabilities."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from tiered.serve.answer import Answer
from tiered.serve.chat_completions import merged
from tiered.serve.conversation import output_form
from tiered.serve.endpoint import client_of, read_fields
from tiered.serve.fields import Fields, clean
from tiered.serve.request import Choice, Finish, Piece, PromptScores
from tiered.serve.responding import respond, together, usage_of
from tiered.serve.service import Service, max_tokens, new_id

MAX_PROMPTS = 256


async def endpoint(http: HttpRequest) -> Response:
    service, fields = await read_fields(http)
    service.check_model(fields)
    prompts = await asyncio.to_thread(read_prompts, service, fields)
    logprobs = fields.integer("logprobs", None, 0, service.limits.logprobs)
    echo = fields.flag("echo")
    form = output_form(service, fields)
    requests = []
    for prompt in prompts:
        for choice in range(service.num_choices(fields, len(prompts))):
            requests.append(
                service.request(
                    fields,
                    prompt,
                    client_of(http),
                    max_new_tokens=max_tokens(fields, "max_tokens", default=16),
                    stop=service.stop_strings(fields),
                    logprobs=logprobs,
                    prompt_logprobs=echo and logprobs is not None,
                    constraint=await asyncio.to_thread(form) if form else None,
                    choice=choice,
                )
            )
    answers = together(service.scheduler, requests)
    completion = Completion(service, answers, fields, echo)
    stream = fields.flag("stream")
    return await respond(http, stream, completion.stream(), completion.whole(), answers)


def read_prompts(service: Service, fields: Fields, name: str = "prompt") -> list[list[int]]:
    """One text, several, one list of token ids, or several."""
    given = fields.get(name)
    if given is None:
        raise fields.wrong(name, "is missing")
    several = isinstance(given, list) and given and isinstance(given[0], (list, str))
    prompts = given if several else [given]
    if not 0 < len(prompts) <= MAX_PROMPTS:
        raise fields.wrong(name, f"must hold 1 to {MAX_PROMPTS} prompts")
    read = []
    for prompt in prompts:
        if isinstance(prompt, str):
            read.append(service.encode(clean(prompt)))
        elif isinstance(prompt, list) and all(type(token) is int for token in prompt):
            if not all(0 <= token < service.engine.config.vocab_size for token in prompt):
                raise fields.wrong(name, "has a token id that this model does not have")
            read.append(prompt)
        else:
            raise fields.wrong(name, "must be text or token ids")
    return read


class Scores:
    """OpenAI's older form of log-probabilities: four lists with an entry for each token."""

    def __init__(self, service: Service, wanted: bool) -> None:
        self.service = service
        self.wanted = wanted
        self.offset = 0
        self.clear()

    def clear(self) -> None:
        self.tokens: list[str] = []
        self.logprobs: list[float | None] = []
        self.best: list[dict[str, float] | None] = []
        self.offsets: list[int] = []

    def add(self, token: int, choice: Choice | None) -> None:
        name = self.name(token)
        self.tokens.append(name)
        self.logprobs.append(None if choice is None else max(choice.logprob, -9999.0))
        self.best.append(None if choice is None else self._alternatives(choice))
        self.offsets.append(self.offset)
        self.offset += len(name)

    def _alternatives(self, choice: Choice) -> dict[str, float]:
        best: dict[str, float] = {}
        for token, logprob in (*choice.alternatives, (choice.token, choice.logprob)):
            best.setdefault(self.name(token), max(logprob, -9999.0))
        return best

    def name(self, token: int) -> str:
        """The token's text; a part of a character is spelled in hexadecimal."""
        data = self.service.tokenizer.token_bytes(token)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    def take(self) -> dict[str, Any] | None:
        """What was added since the last time."""
        if not self.wanted:
            return None
        taken = {
            "tokens": self.tokens,
            "token_logprobs": self.logprobs,
            "top_logprobs": self.best,
            "text_offset": self.offsets,
        }
        self.clear()
        return taken


class Completion:
    """The answers to one request, whole or as they come."""

    def __init__(self, service: Service, answers: list[Answer], fields: Fields, echo: bool) -> None:
        self.service = service
        self.answers = answers
        self.echo = echo
        self.with_usage = fields.object("stream_options", {}).get("include_usage") is True
        self.scores = [Scores(service, a.request.logprobs is not None) for a in answers]
        self.head = {
            "id": new_id("cmpl-"),
            "object": "text_completion",
            "created": int(time.time()),
            "model": service.name,
        }

    def read(self, index: int, event: Any) -> str:
        """The text that an event adds; its log-probabilities go to this answer's scores."""
        scores = self.scores[index]
        if isinstance(event, PromptScores):
            scores.add(self.answers[index].request.ids[0], None)
            for choice in event.choices:
                scores.add(choice.token, choice)
            return ""
        if isinstance(event, (Piece, Finish)):
            # The end token has an entry, too: who scores a prompt leaves one new token out.
            if event.choice:
                scores.add(event.choice.token, event.choice)
            return event.text
        return ""

    def prompt_text(self, index: int) -> str:
        if not self.echo:
            return ""
        return self.service.tokenizer.decode(self.answers[index].request.ids)

    async def whole(self) -> JSONResponse:
        choices = await asyncio.gather(*map(self._choice, range(len(self.answers))))
        return JSONResponse({**self.head, "choices": choices, "usage": self.usage()})

    async def _choice(self, index: int) -> dict[str, Any]:
        answer, text = self.answers[index], [self.prompt_text(index)]
        async for event in answer.events():
            text.append(self.read(index, event))
        assert answer.finish is not None
        return self.choice(index, "".join(text), answer.finish.reason)

    def choice(self, index: int, text: str, reason: str | None) -> dict[str, Any]:
        scores = self.scores[index].take()
        return {"index": index, "text": text, "logprobs": scores, "finish_reason": reason}

    async def stream(self) -> AsyncGenerator[dict[str, Any] | str, None]:
        if self.echo:
            for index in range(len(self.answers)):
                yield {**self.head, "choices": [self.choice(index, self.prompt_text(index), None)]}
        async for index, event in merged(self.answers):
            text = self.read(index, event)
            ended = isinstance(event, Finish)
            if text or ended or self.scores[index].tokens:
                reason = event.reason if ended else None
                yield {**self.head, "choices": [self.choice(index, text, reason)]}
        if self.with_usage:
            yield {**self.head, "choices": [], "usage": self.usage()}
        yield "[DONE]"

    def usage(self) -> dict[str, Any]:
        usage = usage_of([answer.finish for answer in self.answers])
        prompts = {answer.request.ids for answer in self.answers}
        usage["prompt_tokens"] = sum(map(len, prompts))
        usage["total_tokens"] = usage["prompt_tokens"] + usage["completion_tokens"]
        return usage
