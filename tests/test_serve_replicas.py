"""Replicas on Ray Serve: one address, the same answers, also while one of them is killed."""

import os
import signal
import subprocess
import sys

import pytest
from serving import call, make_checkpoint

pytest.importorskip("starlette")
pytest.importorskip("ray")
pytest.importorskip("ray.serve")

import ray

from tiered.engine import Engine
from tiered.serve.replicas import Replicas
from tiered.serve.setup import Setup

pytestmark = pytest.mark.slow  # each replica is a process with an engine
CHOICES = dict(threads=1, context=512, kv_tokens=2048, quantize="none", expert_ram="1G")
KEY = {"Authorization": "Bearer key"}
BODY = {"prompt": "Hello", "max_tokens": 12, "temperature": 0}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def cluster():
    """More CPUs than there may be: what is tested is who answers, not how fast."""
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, configure_logging=False)
    yield
    ray.shutdown()


def test_a_budget_that_cannot_work_is_said_in_a_line(cluster, model, tiered):
    status, _, err = tiered(
        "serve", model, "--replicas", "2", "--port", "0", "--threads", "1", "--expert-ram", "1K"
    )
    assert status == 1
    assert "a replica could not start: MemoryError: an expert budget of 1.0 KiB is too small" in err


@pytest.fixture(scope="module")
def port(cluster, model):
    with Replicas(Setup(model, CHOICES, ("tiny",), api_keys=("key",)), 2, "127.0.0.1", 0) as served:
        yield served.port


def replicas():
    return [
        ray.get_actor(actor["name"], namespace=actor["namespace"])
        for actor in ray.util.list_named_actors(all_namespaces=True)
        if actor["name"].startswith("SERVE_REPLICA")
    ]


def test_they_answer_as_one_server(port, model):
    with Engine(model, **CHOICES) as engine:
        expected = "".join(engine.generate("Hello", 12))
    for _ in range(4):
        status, answer = call(port, "POST", "/v1/completions", BODY, KEY)
        assert status == 200 and answer["choices"][0]["text"] == expected
    assert call(port, "GET", "/v1/models", headers=KEY)[1]["data"][0]["id"] == "tiny"
    assert call(port, "GET", "/v1/models")[0] == 401
    status, answer = call(port, "POST", "/v1/completions", {**BODY, "temperature": -1}, KEY)
    assert status == 400 and "temperature" in answer["error"]["message"]


def test_a_stream_goes_through(port):
    status, text = call(port, "POST", "/v1/completions", {**BODY, "stream": True}, KEY)
    assert status == 200 and text.count("data: ") > 1 and text.rstrip().endswith("[DONE]")


def test_a_killed_replica_is_replaced(port):
    first = replicas()
    assert len(first) == 2
    for actor in first:
        ray.kill(actor)
        for _ in range(4):
            assert call(port, "POST", "/v1/completions", BODY, KEY)[0] == 200


def test_what_a_replica_cannot_do_is_said_in_a_line(cluster, port, model):
    setup = Setup(model, {**CHOICES, "threads": 3}, ("tiny",))
    with (
        pytest.raises(RuntimeError, match="need 6 CPUs, and Ray has 4"),
        Replicas(setup, 2, "127.0.0.1", 0),
    ):
        pass
    with (
        pytest.raises(RuntimeError, match="Ray Serve is running"),
        Replicas(setup._replace(choices=CHOICES), 2, "127.0.0.1", 0),
    ):
        pass
    assert call(port, "GET", "/health")[0] == 200  # the first goes on
    with pytest.raises(OSError, match="take another --port"):
        Replicas(setup, 2, "127.0.0.1", port)


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="two replicas need two CPUs")
def test_the_command(model, tmp_path):
    """In a process and a cluster of its own; SIGTERM ends all of it."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tiered", "serve", str(model), "--replicas", "2", "--port", "0",
         "--threads", "1", "--context", "256", "--quantize", "none"],
        stderr=subprocess.PIPE, text=True,
        env={**os.environ, "COLUMNS": "200", "XDG_RUNTIME_DIR": str(tmp_path)},
    )  # fmt: skip
    with process:
        said = next(line for line in process.stderr if "(page)" in line)
        port = int(said.split(" (page)")[0].rsplit(":", 1)[1])
        assert call(port, "POST", "/v1/completions", BODY)[0] == 200
        process.send_signal(signal.SIGTERM)
        rest = process.stderr.read()
    assert process.returncode == 0 and "ended" in rest
