"""A batch on Ray's workers: nothing is lost or done twice when one of them is killed."""

import asyncio
import json

import pytest
from serving import make_checkpoint

pytest.importorskip("starlette")
pytest.importorskip("ray")

import ray

from tiered.batch.lines import read_lines
from tiered.batch.output import OutputFile
from tiered.batch.ray_workers import TRIES, RayWorkers
from tiered.batch.run import run_batch
from tiered.engine import Engine

pytestmark = pytest.mark.slow  # each worker is a process with an engine
CHOICES = dict(threads=1, context=256, kv_tokens=1024, quantize="none", expert_ram="1G")


@pytest.fixture(scope="module", autouse=True)
def cluster():
    """More CPUs than there may be: what is tested is who answers, not how fast."""
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, configure_logging=False)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def batch(tmp_path):
    requests = [
        {"custom_id": f"r{i}", "body": {"prompt": f"{i}", "max_tokens": 8, "temperature": 0}}
        for i in range(24)
    ]
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps(request) + "\n" for request in requests))
    return path, tmp_path / "out.jsonl", [request["custom_id"] for request in requests]


def expected(model, ids):
    with Engine(model, **CHOICES) as engine:
        return {custom_id: "".join(engine.generate(custom_id[1:], 8)) for custom_id in ids}


def texts(out):
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert len({line["custom_id"] for line in lines}) == len(lines)
    assert {line["response"]["status_code"] for line in lines} == {200}
    return {line["custom_id"]: line["response"]["body"]["choices"][0]["text"] for line in lines}


def test_a_killed_worker_loses_nothing(model, batch):
    """Both die, one after the other, with requests under way."""
    source, out, ids = batch

    async def run():
        async with RayWorkers(model, CHOICES, parallel=2, count=2) as workers:
            first = [worker.actor for worker in workers.workers]
            answers = 0

            def kill():
                nonlocal answers
                answers += 1
                if answers in (3, 6):
                    ray.kill(first.pop())

            with OutputFile(out, ids) as output:
                summary = await run_batch(read_lines(source), workers.ask, output, 8, kill)
            assert not first and len(workers.workers) == 2
            return summary

    summary = asyncio.run(run())
    assert summary.answered == len(ids) and not summary.failed
    assert texts(out) == expected(model, ids)


def test_the_command(model, batch, tiered):
    source, out, ids = batch
    status, _, err = tiered(
        "batch", source, out, model, "--replicas", "2", "--threads", "1", "--context", "256",
        "--quantize", "none",
    )  # fmt: skip
    assert status == 0 and f"{len(ids)} answered, 0 failed" in err
    assert texts(out) == expected(model, ids)


def test_a_request_that_kills_its_workers_is_given_up(model):
    async def run():
        async with RayWorkers(model, CHOICES, parallel=2, count=1) as workers:
            opened = workers._open
            killed = []

            async def opened_and_killed():
                worker = await opened()
                ray.kill(worker.actor)
                killed.append(worker)
                return worker

            workers._open = opened_and_killed
            ray.kill(workers.workers[0].actor)
            status, body = await workers.ask("/v1/completions", {"prompt": "a"})
            assert len(killed) == TRIES
            return status, body["error"]["message"]

    assert asyncio.run(run()) == (500, f"{TRIES} workers died while they answered this")


def test_errors_say_what_to_do(model, tmp_path, batch, tiered):
    source, out, _ = batch
    command = "batch", source, out, model, "--replicas", "3"
    status, _, err = tiered(*command, "--threads", "2")
    assert status == 1 and "need 6 CPUs, and Ray has 4: give less --replicas" in err
    status, _, err = tiered(*command, "--threads", "1", "--expert-ram", "1K")
    assert status == 1 and "could not open the model: an expert budget of 1.0 KiB" in err
    assert ray.is_initialized()  # not ours to end
