"""The commands as a user types them: what they print, and what they say when something is wrong."""

import hashlib
import json
import shutil
import sys

import pytest

from tiered import commands
from tiered.demo import random_tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(random_tiny_model(tmp_path_factory.mktemp("model")))


def test_help_names_every_command_and_every_option_has_a_twin(tiered):
    status, out, _ = tiered("--help")
    assert status == 0
    for name in commands.names():
        assert name in out
        for parameter in commands.find(name).params:
            if parameter.param_type_name == "option":
                long = max(parameter.opts, key=len)
                twin = "TIERED_" + long.lstrip("-").upper().replace("-", "_")
                assert parameter.envvar == twin, (name, parameter.opts)


def test_run_prints_text_and_one_line_about_it(tiered, model):
    status, out, err = tiered("run", model, "the of", "-n", 8, "--raw")
    assert status == 0 and out.strip()
    line = err.strip().splitlines()[-1]
    for word in ("tokens/s", "first after", "hit rate", "read per token"):
        assert word in line


def test_run_as_json(tiered, model):
    status, out, _ = tiered("run", model, "the of", "-n", 8, "--json", "--expert-ram", "80K")
    result = json.loads(out)
    assert status == 0 and result["new_tokens"] == 8 and result["misses"] > 0
    assert {"text", "decode_tok_s", "time_to_first_token", "hit_rate", "bytes_per_token"} <= set(
        result
    )


def test_an_environment_twin_is_the_option(tiered, model, monkeypatch):
    monkeypatch.setenv("TIERED_MAX_NEW_TOKENS", "3")
    _, out, _ = tiered("run", model, "the", "--json")
    assert json.loads(out)["new_tokens"] == 3


def test_bench_as_json(tiered, model, monkeypatch):
    monkeypatch.setattr("cpu_kernels.bandwidth.read_bandwidth", lambda threads: 1e10)
    status, out, _ = tiered(
        "bench", model, "--prefill", 16, "--decode", 4, "--threads", 2, "--json"
    )
    result = json.loads(out)
    assert status == 0 and result["prefill_tok_s"] > 0 and result["decode_tok_s"] > 0


def test_bench_says_what_it_measured_and_what_was_skipped(tiered, model, monkeypatch):
    monkeypatch.setattr("cpu_kernels.bandwidth.read_bandwidth", lambda threads: 1e10)
    arguments = "bench", model, "--prefill", 16, "--decode", 8, "--runs", 1, "--expert-ram", "80K"
    status, out, err = tiered(*arguments)
    assert status == 0, err
    assert "decode" in out and "hit rate" in out and "skipped" not in out
    status, out, err = tiered(*arguments, "--drop-cold", 0.9)
    assert status == 0, err
    assert "cold experts skipped" in out


def test_info_of_a_model_and_of_the_machine(tiered, model):
    status, out, _ = tiered("info", model, "--json")
    facts = json.loads(out)
    assert status == 0 and (facts["layers"], facts["experts"], facts["top_k"]) == (4, 8, 2)
    status, out, _ = tiered("info")
    assert status == 0 and "kernels" in out


def test_files_are_compared_with_their_checksums(tiered, model, tmp_path):
    store = tmp_path / "store"
    assert tiered("convert", model, store)[0] == 0
    status, out, _ = tiered("info", store, "--check", "--json")
    count = json.loads(out)["files_with_right_checksums"]
    assert status == 0 and count == len(json.loads((store / "manifest.json").read_text())["files"])
    status, out, _ = tiered("info", model, "--check")
    assert status == 0 and "nothing was compared" in out
    hub, name = tmp_path / "snapshot", "model.safetensors"  # as in a cache of the hub
    shutil.copytree(model, hub)
    blob = tmp_path / "blobs" / hashlib.sha256((hub / name).read_bytes()).hexdigest()
    blob.parent.mkdir()
    (hub / name).rename(blob)
    (hub / name).symlink_to(blob)
    status, out, _ = tiered("info", hub, "--check", "--json")
    assert status == 0 and json.loads(out)["files_with_right_checksums"] == 1
    data = blob.read_bytes()
    blob.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    status, _, err = tiered("info", hub, "--check")
    assert status == 1 and f"{name} is damaged" in err and "Traceback" not in err
    assert tiered("info", "--check")[0] == 2


def test_convert_then_run_the_store(tiered, model, tmp_path):
    store = tmp_path / "store"
    status, _, err = tiered("convert", model, store)
    assert status == 0 and str(store) in err.replace("\n", "")
    texts = [
        json.loads(tiered("run", path, "the of", "-n", 8, "--raw", "--json")[1])["text"]
        for path in (model, store)
    ]
    assert texts[0] == texts[1]
    status, _, err = tiered("convert", model, store)
    assert status == 1 and "tiered:" in err


def test_trace_then_replay(tiered, model, tmp_path):
    file = tmp_path / "t.trace"
    status, out, _ = tiered(
        "trace", model, "the of", "-o", file, "-n", 8, "--expert-ram", "100K", "--json"
    )
    live = json.loads(out)
    assert status == 0
    status, out, _ = tiered("replay", file, "--expert-ram", "100K", "--json")
    replayed = json.loads(out)
    assert status == 0 and (replayed["hits"], replayed["misses"]) == (live["hits"], live["misses"])
    assert {"hit_pct_cum", "hit_pct_decode", "read_bytes"} <= set(replayed)
    status, out, _ = tiered("replay", file, "--expert-ram", "50K,1M", "--policy", "lru,belady")
    assert status == 0 and "belady" in out


def test_chat_takes_turns(tiered, model, monkeypatch, caplog):
    lines = iter(["hello", "/stats", "again", "/new", "/what", "/exit"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    status, out, err = tiered("chat", model, "-n", 4)
    assert status == 0 and out and err.count("tokens/s") == 3


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["rnu"], 2, "no command 'rnu'"),
        (["run", "MODEL", "x", "--expert-rom", "2G"], 2, "--expert-rom"),
        (["run", "MODEL", "x", "--expert-ram", "lots"], 1, "'lots' is no size"),
        (["run", "MODEL", "x", "--expert-ram", "1K"], 1, "give --expert-ram at least"),
        (["run", "MODEL", "x", "--policy", "fifo"], 1, "unknown policy 'fifo'"),
        (["run", "MODEL", "x", "--temperature", "-1"], 2, "--temperature"),
        (["run", "/no/such/model", "x"], 1, "/no/such/model"),
        (["replay", "/no/such/trace", "--expert-ram", "1G"], 1, "/no/such/trace"),
        (["ppl", "MODEL", "--text", "x", "--json", "/no/such/a"], 2, "no folder /no/such"),
        (["ppl", "MODEL", "--text", "x", "--json", "/"], 2, "/ is a folder"),
        (["ppl", "MODEL", "--text", "x", "--record", "/no/such/a"], 2, "no folder /no/such"),
        (["trace", "MODEL", "x", "-o", "/no/such/a"], 2, "no folder /no/such"),
        (["layer-k", "MODEL", "/no/such/a", "--average", "1", "--text", "x"], 2, "/no/such"),
        (["info", "/no/such/model"], 1, "no such file"),
    ],
    ids=str,
)
def test_mistakes_get_one_clear_line(tiered, model, arguments, status, message):
    arguments = [model if a == "MODEL" else a for a in arguments]
    got, _, err = tiered(*arguments)
    assert got == status and message in err
    assert "Traceback" not in err
    assert (
        len([line for line in err.splitlines() if "Usage" not in line and "Try" not in line]) <= 2
    )


def test_a_damaged_model_is_one_line_and_no_traceback(tiered, tmp_path):
    file = tmp_path / "broken.gguf"
    file.write_bytes(b"GGUF" + b"\xff" * 64)
    for command in ("run", "info", "bench", "convert"):
        arguments = {"run": ["x"], "convert": [tmp_path / "store"]}.get(command, [])
        status, _, err = tiered(command, file, *arguments)
        assert status == 1 and "broken.gguf" in err and len(err.splitlines()) == 1


def test_a_missing_prompt_is_refused(tiered, model, monkeypatch):
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    status, _, err = tiered("run", model)
    assert status == 2 and "PROMPT" in err
