"""POST /v1/embeddings: texts as vectors, made of the hidden states of a model that writes texts."""

from __future__ import annotations

import asyncio
import base64
from typing import Any

import numpy as np
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from tiered.serve.answer import Answer
from tiered.serve.completions import read_prompts
from tiered.serve.endpoint import client_of, read_fields
from tiered.serve.request import Embedding
from tiered.serve.responding import close_all, together
from tiered.serve.service import Service
from tiered.serve.sse import unless_gone


async def endpoint(http: HttpRequest) -> Response:
    """`pooling` (ours) is "mean", the default, or "last"; vectors have length 1 and as many
    dimensions as the model's hidden states."""
    service, fields = await read_fields(http)
    service.check_model(fields)
    pooling = fields.text("pooling", "mean")
    if pooling not in ("mean", "last"):
        raise fields.wrong("pooling", "must be mean or last")
    encoding = fields.text("encoding_format", "float")
    if encoding not in ("float", "base64"):
        raise fields.wrong("encoding_format", "must be float or base64")
    size = service.engine.config.hidden_size
    if fields.integer("dimensions", size) != size:
        raise fields.wrong("dimensions", f"must be {size}: vectors of this model cannot be cut")
    prompts = await asyncio.to_thread(read_prompts, service, fields, "input")
    requests = [
        service.request(fields, prompt, client_of(http), max_new_tokens=0, pooling=pooling)
        for prompt in prompts
    ]
    answers = together(service.scheduler, requests)
    try:
        response = await unless_gone(http.receive, whole(service, answers, encoding))
    finally:
        close_all(answers)
    return response if response is not None else Response(status_code=499)


async def whole(service: Service, answers: list[Answer], encoding: str) -> JSONResponse:
    vectors = await asyncio.gather(*map(vector_of, answers))
    data = [
        {"object": "embedding", "index": index, "embedding": encoded(vector, encoding)}
        for index, vector in enumerate(vectors)
    ]
    count = sum(len(answer.request.ids) for answer in answers)
    usage = {"prompt_tokens": count, "total_tokens": count}
    return JSONResponse({"object": "list", "data": data, "model": service.name, "usage": usage})


async def vector_of(answer: Answer) -> np.ndarray:
    vectors = [event.vector async for event in answer.events() if isinstance(event, Embedding)]
    return vectors[0]


def encoded(vector: np.ndarray, encoding: str) -> Any:
    """As JSON numbers, or as base64 of float32, little-endian."""
    if encoding == "base64":
        return base64.b64encode(vector.astype("<f4").tobytes()).decode()
    return vector.tolist()
