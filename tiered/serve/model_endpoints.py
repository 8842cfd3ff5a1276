"""The small endpoints: what is served, tokens and back, whether we are well."""

from __future__ import annotations

import asyncio

from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, PlainTextResponse, Response

from tiered.serve.chat_completions import chat_messages
from tiered.serve.conversation import Tools, prepare
from tiered.serve.endpoint import read_fields, service_of
from tiered.serve.errors import ApiError
from tiered.serve.fields import clean
from tiered.serve.metrics import exposition


async def models(http: HttpRequest) -> Response:
    service = service_of(http)
    names = [name for name in service.names if name != "*"]
    data = [
        {
            "id": name,
            "object": "model",
            "created": service.created,
            "owned_by": "tiered",
            "max_model_len": service.engine.context,
        }
        for name in names
    ]
    if "name" not in http.path_params:
        return JSONResponse({"object": "list", "data": data})
    for model in data:
        if model["id"] == http.path_params["name"]:
            return JSONResponse(model)
    raise ApiError(f"no model {http.path_params['name']!r} here", 404, code="model_not_found")


async def tokenize(http: HttpRequest) -> Response:
    """Token ids of `content` (or `prompt`), or of a conversation."""
    service, fields = await read_fields(http)
    if fields.has("messages"):
        ids = (await prepare(service, fields, chat_messages(fields), Tools([]), None)).ids
    else:
        text = fields.text("content" if fields.has("content") else "prompt")
        special = fields.flag("add_special", False) or fields.flag("add_special_tokens", False)
        ids = await asyncio.to_thread(service.encode, text, add_bos=None if special else False)
    context = service.engine.context
    return JSONResponse({"tokens": ids, "count": len(ids), "max_model_len": context})


async def detokenize(http: HttpRequest) -> Response:
    service, fields = await read_fields(http)
    ids = fields.items("tokens")
    if not all(type(token) is int and 0 <= token < 2**31 for token in ids):
        raise fields.wrong("tokens", "must be token ids")
    text = service.tokenizer.stream(skip_special=False).push_all(ids)
    return JSONResponse({"content": clean(text), "prompt": text})


async def tokenizer_info(http: HttpRequest) -> Response:
    """What a client that renders and cuts its prompts itself has to know, as vLLM tells it."""
    service = service_of(http)
    tokenizer, ends = service.tokenizer, sorted(service.engine.eos_ids)
    return JSONResponse(
        {
            "bos_token": tokenizer.token_name(tokenizer.bos_id) or None,
            "eos_token": tokenizer.token_name(ends[0]) if ends else None,
            "pad_token": None,
            "chat_template": tokenizer.chat_template,
            "model_max_length": service.engine.context,
        }
    )


async def health(http: HttpRequest) -> Response:
    service = service_of(http)
    if service.draining or not service.scheduler.is_alive:
        return JSONResponse({"status": "shutting down"}, 503)
    return JSONResponse({"status": "ok", "model": service.name})


async def metrics(http: HttpRequest) -> Response:
    text = exposition(service_of(http))
    return PlainTextResponse(text, media_type="text/plain; version=0.0.4")
