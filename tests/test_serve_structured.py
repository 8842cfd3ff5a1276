"""Answers in a given form, from a model with random weights: only the grammar can be the reason."""

import json
import re

import pytest
from naive import NaiveBackend
from serving import call, events, make_checkpoint, serving

pytest.importorskip("starlette")
pytest.importorskip("llguidance")

from tiered.engine import Engine
from tiered.serve.scheduler import Scheduler
from tiered.serve.service import Service

HELLO = [{"role": "user", "content": "Hello"}]
SCHEMA = {
    "type": "object",
    "properties": {"sunny": {"type": "boolean"}, "sky": {"enum": ["blue", "grey"]}},
    "required": ["sunny", "sky"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": SCHEMA}}


@pytest.fixture(scope="module")
def port(tmp_path_factory):
    path = make_checkpoint(tmp_path_factory.mktemp("model"))
    with (
        Engine(path, backend=NaiveBackend(), quantize="none", threads=1, context=1024) as engine,
        Scheduler(engine) as scheduler,
        serving(Service(engine, scheduler, ["tiny"])) as port,
    ):
        yield port


def chat(port, **options):
    body = {"messages": HELLO, "max_tokens": 300, **options}
    status, answer = call(port, "POST", "/v1/chat/completions", body)
    assert status == 200, answer
    return answer["choices"][0]


def check(text):
    value = json.loads(text)
    assert value["sunny"] in (True, False) and value["sky"] in ("blue", "grey")


def test_json_schema(port):
    form = {"type": "json_schema", "json_schema": {"name": "w", "schema": SCHEMA, "strict": True}}
    for seed in range(3):
        choice = chat(port, response_format=form, seed=seed)
        assert choice["finish_reason"] == "stop"
        check(choice["message"]["content"])


def test_reasoning_is_free_and_the_answer_is_not(port):
    form = {"type": "json_schema", "json_schema": {"schema": SCHEMA}}
    variables = {"enable_thinking": True}
    end_think = call(port, "POST", "/tokenize", {"content": "</think>"})[1]["tokens"]
    assert len(end_think) == 1
    end = {str(end_think[0]): 12}
    choice = chat(port, response_format=form, chat_template_kwargs=variables, logit_bias=end)
    assert choice["finish_reason"] == "stop"
    assert "reasoning_content" in choice["message"] or choice["message"]["content"]
    check(choice["message"]["content"])


@pytest.mark.parametrize(
    ("form", "pattern"),
    [
        ({"regex": "[0-9]{3}-[a-f]{2}"}, "[0-9]{3}-[a-f]{2}"),
        ({"choice": ["yes", "no"]}, "yes|no"),
        ({"grammar": 'start: "a" "b"+ /c{2}/'}, "ab+cc"),
        ({"grammar": 'root ::= "x" [0-9] "y"'}, "x[0-9]y"),
    ],
)
def test_other_forms(port, form, pattern):
    text = chat(port, structured_outputs=form)["message"]["content"]
    assert re.fullmatch(pattern, text)


def test_a_tool_call_is_forced_and_read(port):
    for choice in "required", {"type": "function", "function": {"name": "weather"}}:
        answer = chat(port, tools=[TOOL], tool_choice=choice, parallel_tool_calls=False)
        assert answer["finish_reason"] == "tool_calls"
        (made,) = answer["message"]["tool_calls"]
        assert made["function"]["name"] == "weather"
        check(made["function"]["arguments"])


def test_a_tool_call_in_a_stream_and_its_result(port):
    body = {"messages": HELLO, "tools": [TOOL], "tool_choice": "required", "max_tokens": 300,
            "parallel_tool_calls": False}  # fmt: skip
    chunks = events(port, "/v1/chat/completions", body)[:-1]
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    (made,) = [delta["tool_calls"][0] for delta in deltas if "tool_calls" in delta]
    made.pop("index")
    turns = [*HELLO, {"role": "assistant", "content": None, "tool_calls": [made]},
             {"role": "tool", "tool_call_id": made["id"], "content": "fine"}]  # fmt: skip
    assert chat(port, messages=turns, tools=[TOOL], max_tokens=2)["finish_reason"] == "length"


def test_tools_of_the_other_interfaces(port):
    tool = {"name": "weather", "input_schema": SCHEMA}
    body = {"messages": HELLO, "max_tokens": 300, "tools": [tool],
            "tool_choice": {"type": "any", "disable_parallel_tool_use": True}}  # fmt: skip
    status, answer = call(port, "POST", "/v1/messages", body)
    assert (status, answer["stop_reason"]) == (200, "tool_use")
    (block,) = answer["content"]
    check(json.dumps(block["input"]))
    turns = [*HELLO, {"role": "assistant", "content": [block]},
             {"role": "user", "content": [
                 {"type": "tool_result", "tool_use_id": block["id"], "content": "fine"}
             ]}]  # fmt: skip
    status, answer = call(port, "POST", "/v1/messages", {**body, "messages": turns})
    assert status == 200
    tool = {"type": "function", "name": "weather", "parameters": SCHEMA}
    body = {"input": "Hello", "tools": [tool], "tool_choice": "required",
            "parallel_tool_calls": False}  # fmt: skip
    status, answer = call(port, "POST", "/v1/responses", body)
    (item,) = answer["output"]
    check(item["arguments"])
    turns = [*HELLO, item, {"type": "function_call_output", "call_id": item["call_id"],
                            "output": "fine"}]  # fmt: skip
    body = {"input": turns, "max_output_tokens": 3}
    assert call(port, "POST", "/v1/responses", body)[0] == 200


@pytest.mark.parametrize(
    "options",
    [
        {"response_format": {"type": "xml"}},
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "x"}}}},
        {"structured_outputs": {"regex": "("}},
        {"structured_outputs": {"grammar": "start: nothing"}},
        {"structured_outputs": {"choice": []}},
        {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "other"}}},
        {"tools": [{"type": "function"}]},
    ],
)
def test_what_cannot_be_is_refused(port, options):
    body = {"messages": HELLO, "max_tokens": 3, **options}
    status, answer = call(port, "POST", "/v1/chat/completions", body)
    assert status == 400, answer
