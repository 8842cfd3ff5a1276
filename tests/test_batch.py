"""Batches: every request is answered once, whatever stops the run; errors stay on their line."""

import asyncio
import json
import signal
import subprocess
import sys

import pytest
from serving import make_checkpoint

pytest.importorskip("starlette")

from tiered.batch.lines import Line, check_lines, parse
from tiered.batch.output import OutputFile
from tiered.batch.run import run_batch
from tiered.engine import Engine

OPTIONS = "--threads", "1", "--context", "256", "--quantize", "none"


def chat(custom_id, text="Hello", **body):
    messages = [{"role": "user", "content": text}]
    body = {"messages": messages, "max_tokens": 4, "temperature": 0, **body}
    return {"custom_id": custom_id, "url": "/v1/chat/completions", "body": body}


def completion(custom_id, **body):
    body = {"prompt": "Hello", "max_tokens": 4, "temperature": 0, **body}
    return {"custom_id": custom_id, "body": body}


def write(path, requests):
    path.write_text("".join(json.dumps(request) + "\n" for request in requests))
    return path


def read(path):
    """Answers by custom_id; none is there twice."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    answers = {line["custom_id"]: line["response"] for line in lines}
    assert len(answers) == len(lines)
    return answers


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("model") / "tiny")


def test_requests_get_what_they_would_get_alone(model, tmp_path, tiered):
    texts = ["Hello", "How are you?", "Why?", "a b c"]
    requests = [completion(f"c{i}", prompt=text, max_tokens=9) for i, text in enumerate(texts)]
    requests += [chat("chat", model="gpt-something"), completion("two", n=2, temperature=1, seed=1)]
    source, out = write(tmp_path / "in.jsonl", requests), tmp_path / "out.jsonl"
    status, text, err = tiered("batch", source, out, model, *OPTIONS)
    assert (status, text) == (0, "") and "6 answered, 0 failed" in err
    answers = read(out)
    assert {answer["status_code"] for answer in answers.values()} == {200}
    with Engine(model, threads=1, context=256, quantize="none") as engine:
        for index, text in enumerate(texts):
            choice = answers[f"c{index}"]["body"]["choices"][0]
            assert choice["text"] == "".join(engine.generate(text, 9))
    assert answers["chat"]["body"]["object"] == "chat.completion"
    assert answers["chat"]["body"]["usage"]["completion_tokens"] == 4
    assert len(answers["two"]["body"]["choices"]) == 2


def test_errors_stay_on_their_line(model, tmp_path, tiered):
    requests = [completion("good"), completion("hot", temperature=-1), chat("many", "x" * 300)]
    requests += [completion("text", prompt="\ud800"), {"custom_id": "[red]", "body": {}}]
    source, out = write(tmp_path / "in.jsonl", requests), tmp_path / "out.jsonl"
    status, text, err = tiered("batch", source, out, model, *OPTIONS, "--json")
    facts = json.loads(text)
    assert status == 0 and facts["answered"] == 1
    assert set(facts["failed"]) == {"hot", "many", "text", "[red]"}
    answers = read(out)
    assert {key: a["status_code"] for key, a in answers.items()} == {
        "good": 200, "hot": 400, "many": 400, "text": 400, "[red]": 400,
    }  # fmt: skip
    assert answers["hot"]["body"]["error"]["param"] == "temperature"
    # They have their answer: a second run does not open the model to ask again.
    status, text, err = tiered("batch", source, out, tmp_path, *OPTIONS)
    assert status == 0 and "0 answered, 0 failed, 5 had an answer" in err


def test_bad_lines_are_named_before_anything_begins(tmp_path, tiered):
    lines = [
        json.dumps(completion("a")), "", "{", json.dumps(completion("a")), json.dumps([1]),
        json.dumps({"custom_id": "b"}), json.dumps({"body": {}}), json.dumps({}),
    ]  # fmt: skip
    source = tmp_path / "in.jsonl"
    source.write_text("\n".join(lines))
    with pytest.raises(ValueError) as caught:
        check_lines(source)
    message = str(caught.value)
    assert message.startswith(f"{source}: line 3: it is not JSON")
    assert "line 4: custom_id 'a' is that of line 1, too" in message
    assert message.endswith("and 1 more")
    out = tmp_path / "out.jsonl"
    status, _, err = tiered("batch", source, out, tmp_path)
    assert status == 1 and "line 3" in err and not out.exists()
    source.write_text("\n")
    with pytest.raises(ValueError, match="no requests"):
        check_lines(source)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"url": "/v1/models"}, "url must be one of /v1/chat/completions"),
        ({"url": ["x"]}, "url must be"),
        ({"method": "GET"}, "method must be POST"),
        ({"body": {"stream": True}}, "cannot be a stream"),
        ({"custom_id": ""}, "custom_id must be text"),
        ({"custom_id": 3}, "custom_id must be text"),
    ],
)
def test_lines_are_checked(change, message):
    with pytest.raises(ValueError, match=message):
        parse(json.dumps({**completion("a"), **change}).encode())


def test_deep_json_is_a_bad_line_like_others():
    with pytest.raises(ValueError, match="not JSON"):
        parse(b'{"custom_id": "a", "body": ' + b"[" * 100_000)


def test_the_url_follows_from_the_body():
    assert parse(json.dumps({"custom_id": "a", "body": {"messages": []}}).encode()).url == (
        "/v1/chat/completions"
    )
    assert parse(json.dumps(completion("a")).encode()).url == "/v1/completions"


# --- what stops a run ---

IDS = [f"r{number}" for number in range(20)]
LINES = [Line(custom_id, "/v1/completions", {"id": custom_id}) for custom_id in IDS]


def run(out, ask, at_once=4):
    with OutputFile(out, IDS) as output:
        return asyncio.run(run_batch(LINES, ask, output, at_once))


def answering(asked, stop_after=None, error=KeyboardInterrupt):
    """An `ask` that notes what it was asked, and fails after so many answers."""

    async def ask(url, body):
        await asyncio.sleep(0)
        if len(asked) == stop_after:
            raise error("stop")
        asked.append(body["id"])
        return 200, {"echo": body["id"]}

    return ask


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_a_stopped_run_goes_on(tmp_path, error):
    out, asked = tmp_path / "out.jsonl", []
    with pytest.raises(error):
        run(out, answering(asked, 7, error))
    first = read(out)
    assert set(first) <= set(asked) and len(asked) == 7
    summary = run(out, answering(asked))
    assert summary.answered == 20 - len(first)
    assert read(out) == first | read(out) and set(read(out)) == set(IDS)


@pytest.mark.parametrize("cut", [1, 10, 1000])
def test_a_part_of_a_line_is_no_answer(tmp_path, cut):
    """As a process leaves it that is killed while it writes."""
    out = tmp_path / "out.jsonl"
    run(out, answering([]))
    data = out.read_bytes()
    out.write_bytes(data[:-cut])
    kept = data[:-cut].count(b"\n")
    asked = []
    assert run(out, answering(asked)).answered == len(asked) == 20 - kept
    assert set(read(out)) == set(IDS)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.jsonl"]


def test_what_failed_by_our_fault_is_asked_again(tmp_path):
    """A disk that could not be read, say; but not what was wrong with the request."""
    out, asked = tmp_path / "out.jsonl", []

    async def ask(url, body):
        asked.append(body["id"])
        status = {"r3": 500, "r4": 400}.get(body["id"], 200)
        return status, {"error": {"message": "no"}} if status != 200 else {}

    assert run(out, ask).failed == {"r3": "no", "r4": "no"}
    assert asked == IDS
    assert run(out, answering(asked)).answered == 1
    assert asked == [*IDS, "r3"] and read(out)["r3"]["status_code"] == 200


def test_a_link_stays_one(tmp_path):
    out = tmp_path / "real.jsonl"
    run(out, answering([]))
    out.write_bytes(out.read_bytes()[:-1])
    link = tmp_path / "out.jsonl"
    link.symlink_to(out)
    assert run(link, answering([])).answered == 1
    assert link.is_symlink() and set(read(out)) == set(IDS)


def test_an_output_of_something_else_is_left_as_it_is(tmp_path):
    out = tmp_path / "out.jsonl"
    for text in ("notes\n", '{"custom_id": "other", "response": {"status_code": 200}}\n', "[1]\n"):
        out.write_text(text)
        with pytest.raises(ValueError, match=r"out.jsonl, line 1: .* another file"):
            OutputFile(out, IDS)
        assert out.read_text() == text


def test_two_runs_do_not_share_an_output(tmp_path):
    out = tmp_path / "out.jsonl"
    with OutputFile(out, IDS), pytest.raises(OSError, match="another run"):
        OutputFile(out, IDS)
    OutputFile(out, IDS).close()


def test_the_same_file_twice_is_refused(tmp_path, tiered):
    source = write(tmp_path / "in.jsonl", [completion("a")])
    status, _, err = tiered("batch", source, source, tmp_path)
    assert status == 2 and "same file" in err
    status, _, err = tiered("batch", tmp_path / "none.jsonl", source, tmp_path)
    assert status == 2 and "does not exist" in err


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_command_goes_on(model, tmp_path, tiered, number):
    requests = [completion(f"r{i}", max_tokens=20, ignore_eos=True) for i in range(40)]
    source, out = write(tmp_path / "in.jsonl", requests), tmp_path / "out.jsonl"
    process = subprocess.Popen(
        [sys.executable, "-m", "tiered", "-v", "batch", str(source), str(out), str(model),
         *OPTIONS, "--parallel", "2"],
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    with process:
        answered = (line for line in process.stderr if "answered r" in line)
        for _ in range(3):
            next(answered)
        process.send_signal(number)
        process.stderr.read()
    assert process.returncode in (-signal.SIGKILL, 130)
    before = out.read_text().count("\n")
    assert 3 <= before < 40
    status, _, err = tiered("batch", source, out, model, *OPTIONS)
    assert status == 0 and f"{40 - before} answered, 0 failed, {before} had" in err
    assert set(read(out)) == {request["custom_id"] for request in requests}
