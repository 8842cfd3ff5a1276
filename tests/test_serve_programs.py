"""Programs that people point at a server: the llm command line, and lm-eval with its scores."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from naive import NaiveBackend
from serving import make_checkpoint, serving

pytest.importorskip("starlette")

from tiered.engine import Engine
from tiered.serve.scheduler import Scheduler
from tiered.serve.service import Service
from tiered.text.sampling import log_softmax

pytestmark = pytest.mark.slow  # each is a process that imports a lot
CHOICES = dict(quantize="none", threads=1, context=1024)
QUESTIONS = ["The sky is", "One and one are", "Snow is", "A cat says"]
CONTINUATIONS = [" blue", " a fish", " green, and loud"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def port(model):
    with (
        Engine(model, backend=NaiveBackend(), **CHOICES) as engine,
        Scheduler(engine) as scheduler,
        serving(Service(engine, scheduler, ["tiny"]), api_keys=["key"]) as port,
    ):
        yield port


@pytest.fixture(scope="module")
def engine(model):
    """Another one: the server's belongs to its scheduler."""
    with Engine(model, backend=NaiveBackend(), **CHOICES) as engine:
        yield engine


def run(*command, **environment):
    done = subprocess.run(
        [sys.executable, *map(str, command)], capture_output=True, text=True, timeout=300,
        env={**os.environ, "NO_PROXY": "127.0.0.1", **{k: str(v) for k, v in environment.items()}},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


# --- llm ---


@pytest.fixture
def llm(port, tmp_path):
    pytest.importorskip("llm", reason="pip install 'tiered[clients]'")
    model = f"  model_name: tiny\n  api_base: http://127.0.0.1:{port}/v1\n  api_key_name: ours\n"
    (tmp_path / "extra-openai-models.yaml").write_text(
        f"- model_id: tiny-chat\n{model}  supports_schema: true\n"
        f"- model_id: tiny-text\n{model}  completion: true\n"
    )
    (tmp_path / "keys.json").write_text('{"ours": "key"}')
    return lambda *command: run("-m", "llm", *command, LLM_USER_PATH=tmp_path)


def test_llm(llm, engine):
    options = "-o", "max_tokens", "8", "-o", "temperature", "0"
    messages = [{"role": "user", "content": "Hello"}]
    expected = "".join(engine.chat(messages, 8)).strip()
    assert llm("-m", "tiny-chat", "Hello", *options).strip() == expected
    assert llm("-m", "tiny-chat", "Hello", "--no-stream", *options).strip() == expected
    expected = "".join(engine.generate("Hello", 8)).strip()
    assert llm("-m", "tiny-text", "Hello", *options).strip() == expected
    logged = json.loads(llm("logs", "--json", "-n", "0"))
    assert [log["output_tokens"] for log in logged if log["model"] == "tiny-chat"] == [8, 8]


def test_llm_schema(llm):
    pytest.importorskip("llguidance")
    answer = llm("-m", "tiny-chat", "Hello", "--schema", "sunny bool", "-o", "seed", "1")
    assert json.loads(answer)["sunny"] in (True, False)


# --- lm-eval ---


def loglikelihood(engine, context, continuation):
    """The log-probability of `continuation`, which follows `context` (both are token ids)."""
    rows = engine.logits([*context, *continuation])[len(context) - 1 : -1]
    return sum(float(log_softmax(row)[t]) for row, t in zip(rows, continuation, strict=True))


def write_tasks(folder, engine):
    """Three tasks, with what the engine says of them: right for half of the questions."""
    encode, end = engine.tokenizer.encode, max(engine.eos_ids)
    values = [
        [loglikelihood(engine, encode(q), encode(c)) for c in CONTINUATIONS] for q in QUESTIONS
    ]
    best = [int(np.argmax(row)) for row in values]
    answers = [b if i % 2 else (b + 1) % 3 for i, b in enumerate(best)]
    said = ["".join(engine.generate(q, 6)) for q in QUESTIONS]
    lines = [
        {"q": q, "choices": CONTINUATIONS, "answer": a, "said": text if i % 2 else text + "?"}
        for i, (q, a, text) in enumerate(zip(QUESTIONS, answers, said, strict=True))
    ]
    data = folder / "lines.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    common = {
        "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test", "target_delimiter": "",
    }  # fmt: skip
    metric = {"aggregation": "mean", "higher_is_better": True}
    tasks = {
        "choose": dict(
            output_type="multiple_choice", doc_to_text="{{q}}", doc_to_choice="{{choices}}",
            doc_to_target="answer", metric_list=[{"metric": "acc", **metric}],
        ),
        "say": dict(
            output_type="generate_until", doc_to_text="{{q}}", doc_to_target="{{said}}",
            generation_kwargs={"until": ["\u2603"], "max_gen_toks": 6, "do_sample": False},
            metric_list=[{"metric": "exact_match", **metric}],
        ),
        "roll": dict(
            output_type="loglikelihood_rolling", doc_to_text="", doc_to_target="{{q}}",
            metric_list=[{"metric": "byte_perplexity"}],
        ),
    }  # fmt: skip
    for name, task in tasks.items():  # JSON is YAML, too
        (folder / f"{name}.yaml").write_text(json.dumps({"task": name, **common, **task}))
    total = sum(loglikelihood(engine, [end], encode(q)) for q in QUESTIONS)
    return values, np.exp(-total / sum(len(q.encode()) for q in QUESTIONS))


@pytest.mark.parametrize("tokenizer", ["huggingface", "remote"])
def test_lm_eval(port, model, engine, tmp_path, tokenizer):
    """Its scores are those that follow from the engine's own logits."""
    for name in ("lm_eval", "tenacity", "transformers"):
        pytest.importorskip(name, reason="pip install 'tiered[clients]'")
    values, perplexity = write_tasks(tmp_path, engine)
    url = f"http://127.0.0.1:{port}/v1/completions"
    arguments = f"model=tiny,base_url={url},tokenizer_backend={tokenizer},num_concurrent=2"
    arguments += f",tokenizer={model}" if tokenizer == "huggingface" else ",auth_token=key"
    run(
        "-m", "lm_eval", "--model", "local-completions", "--model_args", arguments,
        "--tasks", "choose,say,roll", "--include_path", tmp_path, "--batch_size", "4",
        "--output_path", tmp_path / "out", "--log_samples",
        OPENAI_API_KEY="key", HF_HOME=tmp_path / "hf", HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1",
    )  # fmt: skip
    results = json.loads(only(tmp_path / "out", "results_*.json").read_text())["results"]
    assert results["choose"]["acc,none"] == results["say"]["exact_match,none"] == 0.5
    assert results["roll"]["byte_perplexity,none"] == pytest.approx(perplexity, rel=1e-4)
    samples = only(tmp_path / "out", "samples_choose_*.jsonl").read_text().splitlines()
    for sample in map(json.loads, samples):
        got = [float(pair[0]) for pair in sample["filtered_resps"]]
        assert got == pytest.approx(values[sample["doc_id"]], rel=1e-4)


def only(folder: Path, pattern: str) -> Path:
    (found,) = folder.rglob(pattern)
    return found
