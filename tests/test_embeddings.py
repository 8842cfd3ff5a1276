"""Texts as vectors: the hidden states that the head would read, pooled, by library and server."""

import base64
import json

import numpy as np
import pytest
import tiny
from naive import NaiveBackend
from serving import call, make_checkpoint, serving

from tiered.engine import Engine

PROMPT = np.random.default_rng(0).integers(3, 256, 40).tolist()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.hf_checkpoint(tmp_path_factory.mktemp("m") / "m", "qwen3_moe", "f32")


def states_of(model, **choices):
    with Engine(model, **{"threads": 2, **choices}) as engine:
        return engine.hidden_states(PROMPT)


@pytest.mark.parametrize("architecture", ["qwen3_moe", "qwen3_next", "deepseek_v3"])
def test_hidden_states_are_what_the_head_reads(tmp_path, architecture):
    """`head @ hidden` are the logits."""
    folder = tiny.hf_checkpoint(tmp_path, architecture, "f32")
    with Engine(folder, quantize="none", threads=2) as engine:
        states, logits = engine.hidden_states(PROMPT), engine.logits(PROMPT)
        head = engine.checkpoint.float32("head")
    assert states.shape == (40, 64) and states.dtype == np.float32
    assert np.abs(states @ head.T - logits).max() <= 1e-5 * np.ptp(logits)


def test_hidden_states_agree_with_plain_numpy_and_in_pieces(folder):
    expected = states_of(folder, quantize="none", kv_dtype="f32", backend=NaiveBackend())
    for chunk in (7, 512):
        got = states_of(folder, quantize="none", kv_dtype="f32", prefill_chunk=chunk)
        assert np.abs(got - expected).max() <= 1e-5 * np.ptp(expected)
    got = states_of(folder, quantize="int4")
    assert 0 < np.abs(got - expected).max() <= 0.2 * np.ptp(expected)


@pytest.mark.slow
def test_hidden_states_are_those_of_transformers(folder):
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    import torch

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        out = model(torch.tensor([PROMPT]), output_hidden_states=True)
    expected = out.hidden_states[-1][0].numpy()
    got = states_of(folder, quantize="none", kv_dtype="f32")
    assert np.abs(got - expected).max() <= 1e-5 * np.ptp(expected)


# --- the server ---


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def port(model):
    pytest.importorskip("starlette")
    from tiered.serve.scheduler import Scheduler
    from tiered.serve.service import Service

    with (
        Engine(model, backend=NaiveBackend(), quantize="none", context=256, kv_tokens=512,
               prefill_chunk=16) as engine,
        Scheduler(engine) as scheduler,
        serving(Service(engine, scheduler, ["tiny"])) as port,
    ):  # fmt: skip
        yield port


def embed(port, **body):
    return call(port, "POST", "/v1/embeddings", body)


TEXTS = ["Hello", "What is this? " * 4, "x" * 100]


@pytest.fixture(scope="module")
def expected(model):
    """By pooling, for TEXTS: float32 [3, hidden_size]."""
    with Engine(model, backend=NaiveBackend(), quantize="none", context=256) as engine:
        states = [engine.hidden_states(engine.tokenizer.encode(text)) for text in TEXTS]
    pooled = {"mean": [s.mean(axis=0) for s in states], "last": [s[-1] for s in states]}
    return {name: [v / np.linalg.norm(v) for v in rows] for name, rows in pooled.items()}


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_embeddings_are_pooled_hidden_states(port, expected, pooling):
    for _ in range(2):  # the second time, a remembered prefix is there to be misused
        status, answer = embed(port, input=TEXTS, pooling=pooling)
        assert status == 200, answer
        got = np.array([item["embedding"] for item in answer["data"]])
        assert [item["index"] for item in answer["data"]] == [0, 1, 2]
        assert np.abs(got - expected[pooling]).max() <= 1e-5
        assert np.linalg.norm(got, axis=1) == pytest.approx(1, abs=1e-5)
    count = sum(map(len, TEXTS))  # a token is a byte
    assert answer["usage"] == {"prompt_tokens": count, "total_tokens": count}


def test_forms_of_input_and_output(port, expected):
    plain = np.array(embed(port, input="Hello")[1]["data"][0]["embedding"])
    assert np.abs(plain - expected["mean"][0]).max() <= 1e-5
    coded = embed(port, input=["Hello"], encoding_format="base64", dimensions=64)[1]["data"][0]
    got = np.frombuffer(base64.b64decode(coded["embedding"]), "<f4")
    assert np.array_equal(got, plain.astype(np.float32))
    ids = call(port, "POST", "/tokenize", {"content": "Hello"})[1]["tokens"]
    assert embed(port, input=ids)[1]["data"] == embed(port, input="Hello")[1]["data"]
    assert len(embed(port, input=[ids, ids])[1]["data"]) == 2


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({}, "input is missing"),
        ({"input": []}, "prompt is empty"),
        ({"input": ""}, "prompt is empty"),
        ({"input": [[999]]}, "input has a token id"),
        ({"input": "a", "dimensions": 32}, "dimensions must be 64"),
        ({"input": "a", "pooling": "max"}, "pooling must be mean or last"),
        ({"input": "a", "encoding_format": "int8"}, "encoding_format must be"),
        ({"input": "x" * 300}, "300 tokens and the context holds 256"),
    ],
)
def test_errors_name_the_field(port, body, message):
    status, answer = embed(port, **body)
    assert status == 400 and message in answer["error"]["message"]


def test_the_openai_package(port, expected):
    openai = pytest.importorskip("openai")
    with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="-") as client:
        answer = client.embeddings.create(model="tiny", input=TEXTS[:2])
    got = np.array([item.embedding for item in answer.data])
    assert np.abs(got - expected["mean"][:2]).max() <= 1e-5


@pytest.mark.slow
def test_a_batch_of_embeddings(model, tmp_path, tiered):
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    line = {"custom_id": "a", "url": "/v1/embeddings", "body": {"input": "Hello"}}
    source.write_text(json.dumps(line))
    status, _, err = tiered("batch", source, out, model, "--threads", "1", "--context", "256")
    assert status == 0 and "1 answered" in err
    body = json.loads(out.read_text())["response"]["body"]
    assert len(body["data"][0]["embedding"]) == 64
