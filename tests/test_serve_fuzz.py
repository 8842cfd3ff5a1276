"""Whatever a client sends: an answer or an error of its own, never a 500, and nothing is left."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from naive import NaiveBackend
from serving import call, make_checkpoint, serving

pytest.importorskip("starlette")

from tiered.engine import Engine
from tiered.kv_cache import PAGE_SIZE
from tiered.serve.scheduler import Scheduler
from tiered.serve.service import Service

POSTS = [
    "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages",
    "/v1/messages/count_tokens", "/v1/embeddings", "/tokenize", "/detokenize", "/settings",
]  # fmt: skip
SCALARS = (
    st.none() | st.booleans() | st.integers(-3, 40) | st.integers() | st.floats(width=32)
    | st.text(max_size=8) | st.sampled_from(["user", "text", "auto", "<|im_end|>", "\ue0000\ue001"])
)  # fmt: skip
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)
TEXT_PART = st.fixed_dictionaries({"type": st.just("text"), "text": st.text(max_size=5)})
MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "system", "tool"]) | SCALARS,
     "content": st.text(max_size=9) | st.lists(TEXT_PART, max_size=2) | VALUES},
    optional={"tool_calls": VALUES, "reasoning_content": VALUES},
)  # fmt: skip
SCHEMA = st.sampled_from([{"type": "object"}, {"enum": ["a"]}, {"$ref": "#"}, {"type": 3}]) | VALUES
TOOL = st.fixed_dictionaries(
    {"type": st.just("function")},
    optional={"name": st.text(max_size=4), "input_schema": SCHEMA, "parameters": SCHEMA,
              "function": st.fixed_dictionaries({"name": st.text(min_size=1, max_size=4),
                                                 "parameters": SCHEMA})},
)  # fmt: skip
FIELDS = {
    "model": st.just("tiny") | VALUES,
    "messages": st.lists(MESSAGE, max_size=3) | VALUES,
    "prompt": st.text(max_size=9) | st.lists(st.integers(0, 300), max_size=5) | VALUES,
    "input": st.text(max_size=9) | st.lists(MESSAGE, max_size=2) | VALUES,
    "content": VALUES,
    "tokens": st.lists(st.integers(-1, 400), max_size=9) | VALUES,
    "system": VALUES,
    "stream": st.booleans() | VALUES,
    "stream_options": st.just({"include_usage": True}) | VALUES,
    "n": st.integers(1, 3) | VALUES,
    "temperature": st.floats(0, 2) | VALUES,
    "top_p": st.floats(0, 1) | VALUES,
    "top_k": st.integers(-1, 10) | VALUES,
    "min_p": VALUES,
    "seed": VALUES,
    "stop": st.text(max_size=2) | VALUES,
    "stop_sequences": VALUES,
    "logprobs": st.booleans() | st.integers(0, 5) | VALUES,
    "top_logprobs": st.integers(0, 5) | VALUES,
    "echo": st.booleans() | VALUES,
    "logit_bias": st.dictionaries(st.integers(0, 300).map(str), st.integers(-100, 100), max_size=2)
    | VALUES,
    "presence_penalty": st.floats(-2, 2) | VALUES,
    "repetition_penalty": st.floats(0, 2) | VALUES,
    "tools": st.lists(TOOL, max_size=2) | VALUES,
    "tool_choice": st.sampled_from(["auto", "none", "required", {"type": "any"}]) | VALUES,
    "response_format": st.fixed_dictionaries(
        {"type": st.sampled_from(["text", "json_object", "json_schema", "x"])},
        optional={"json_schema": st.fixed_dictionaries({"schema": SCHEMA}) | VALUES},
    ) | VALUES,
    "structured_outputs": st.dictionaries(
        st.sampled_from(["regex", "choice", "grammar", "json"]), VALUES, max_size=1) | VALUES,
    "chat_template_kwargs": VALUES,
    "text": VALUES,
    "look_ahead": VALUES,
    "max_running": st.just(4) | st.booleans(),
    "expert_ram": VALUES,
}  # fmt: skip
LENGTHS = {name: st.integers(0, 6) for name in
           ("max_tokens", "max_completion_tokens", "max_output_tokens")}  # fmt: skip
BODIES = st.fixed_dictionaries(LENGTHS, optional=FIELDS)
FUZZ = settings(
    max_examples=150, deadline=None, derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    path = make_checkpoint(tmp_path_factory.mktemp("model"), layers=1)
    with (
        Engine(path, backend=NaiveBackend(), quantize="none", threads=1, context=256) as engine,
        Scheduler(engine) as scheduler,
        serving(Service(engine, scheduler, ["tiny"])) as port,
    ):
        yield port, scheduler


def check(server, path, body):
    port, scheduler = server
    status, answer = call(port, "POST", path, body)
    assert status in (200, 400, 404, 413, 501), (path, answer)
    if status != 200:
        assert answer["error"]["message"]
    elif isinstance(answer, str):
        assert "the request failed" not in answer
    held = scheduler.engine.kv.num_pages - scheduler.engine.kv.free_tokens // PAGE_SIZE
    if not scheduler.running and not scheduler.waiting:
        assert held == len(scheduler.prefixes)


@FUZZ
@given(path=st.sampled_from(POSTS), body=BODIES)
def test_any_fields(server, path, body):
    check(server, path, json.dumps(body).encode())


@FUZZ
@given(
    path=st.sampled_from(POSTS),
    body=st.binary(max_size=50) | VALUES.map(json.dumps).map(str.encode),
)
def test_any_body(server, path, body):
    check(server, path, body)
