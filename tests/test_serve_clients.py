"""The clients that people have: the openai and anthropic packages against a server of ours."""

import json

import pytest
from naive import NaiveBackend
from serving import make_checkpoint, serving

pytest.importorskip("starlette")

from tiered.engine import Engine
from tiered.serve.scheduler import Scheduler
from tiered.serve.service import Service

HELLO = [{"role": "user", "content": "Hello"}]
PARAMETERS = {
    "type": "object",
    "properties": {"sunny": {"type": "boolean"}},
    "required": ["sunny"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def port(tmp_path_factory):
    path = make_checkpoint(tmp_path_factory.mktemp("model"))
    with (
        Engine(path, backend=NaiveBackend(), quantize="none", threads=1, context=1024) as engine,
        Scheduler(engine) as scheduler,
        serving(Service(engine, scheduler, ["tiny"]), api_keys=["key"]) as port,
    ):
        yield port


@pytest.fixture
def openai_client(port):
    openai = pytest.importorskip("openai")
    with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="key") as client:
        yield client


@pytest.fixture
def anthropic_client(port):
    anthropic = pytest.importorskip("anthropic")
    with anthropic.Anthropic(base_url=f"http://127.0.0.1:{port}", api_key="key") as client:
        yield client


def test_openai_chat(openai_client):
    answer = openai_client.chat.completions.create(
        model="tiny", messages=HELLO, max_tokens=6, seed=1, logprobs=True, top_logprobs=1
    )
    stream = openai_client.chat.completions.create(
        model="tiny", messages=HELLO, max_tokens=6, seed=1, stream=True,
        stream_options={"include_usage": True},
    )  # fmt: skip
    chunks = list(stream)
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == answer.choices[0].message.content
    assert chunks[-1].usage.completion_tokens == answer.usage.completion_tokens == 6
    assert len(answer.choices[0].logprobs.content) == 6


def test_openai_completions_and_models(openai_client):
    assert [model.id for model in openai_client.models.list()] == ["tiny"]
    answer = openai_client.completions.create(
        model="tiny", prompt=[1, 2, 3], max_tokens=2, echo=True, logprobs=2
    )
    assert len(answer.choices[0].logprobs.tokens) == 5


def test_openai_responses(openai_client):
    answer = openai_client.responses.create(model="tiny", input="Hello", max_output_tokens=5)
    assert answer.status == "incomplete" and answer.usage.output_tokens == 5
    with openai_client.responses.stream(model="tiny", input="Hello", max_output_tokens=5) as stream:
        kinds = [event.type for event in stream]
    assert kinds[0] == "response.created" and kinds[-1] == "response.incomplete"


def test_openai_tools(openai_client):
    pytest.importorskip("llguidance")
    answer = openai_client.chat.completions.create(
        model="tiny", messages=HELLO, max_tokens=200, tool_choice="required",
        tools=[{"type": "function", "function": {"name": "sky", "parameters": PARAMETERS}}],
        parallel_tool_calls=False,
    )  # fmt: skip
    (made,) = answer.choices[0].message.tool_calls
    assert json.loads(made.function.arguments)["sunny"] in (True, False)


def test_openai_errors(openai_client, port):
    openai = pytest.importorskip("openai")
    with pytest.raises(openai.BadRequestError, match="temperature"):
        openai_client.chat.completions.create(model="tiny", messages=HELLO, temperature=-1)
    with pytest.raises(openai.NotFoundError):
        openai_client.chat.completions.create(model="other", messages=HELLO)
    with (
        openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="wrong") as stranger,
        pytest.raises(openai.AuthenticationError),
    ):
        stranger.models.list()


def test_anthropic_messages(anthropic_client):
    options = {"model": "tiny", "messages": HELLO, "max_tokens": 6, "extra_body": {"seed": 2}}
    answer = anthropic_client.messages.create(**options)
    assert answer.stop_reason == "max_tokens" and answer.usage.output_tokens == 6
    with anthropic_client.messages.stream(**options) as stream:
        text = "".join(stream.text_stream)
        assert stream.get_final_message().stop_reason == "max_tokens"
    assert text == answer.content[0].text


def test_anthropic_tools_and_counts(anthropic_client):
    pytest.importorskip("llguidance")
    with anthropic_client.messages.stream(
        model="tiny", messages=HELLO, max_tokens=200,
        tools=[{"name": "sky", "input_schema": PARAMETERS}],
        tool_choice={"type": "any", "disable_parallel_tool_use": True},
    ) as stream:  # fmt: skip
        message = stream.get_final_message()
    assert message.stop_reason == "tool_use"
    assert message.content[0].input["sunny"] in (True, False)
    count = anthropic_client.messages.count_tokens(model="tiny", messages=HELLO)
    assert count.input_tokens > 5
