"""A simulated sweep on Ray's workers: the same rows, also when a worker dies."""

import csv
import json
import os
from pathlib import Path

import pytest

pytest.importorskip("ray")

import ray

from tiered.cluster import each
from tiered.demo import random_tiny_model

pytestmark = pytest.mark.slow  # Ray starts processes
GRID = ("olmoe-1b-7b", "--gpu", "laptop", "--ram", "3G,6G", "--policy", "lru,layer_lfu")


@pytest.fixture(scope="module", autouse=True)
def cluster():
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, configure_logging=False)
    yield
    ray.shutdown()


def rows_of(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_rows_are_those_of_one_process(tiered, tmp_path):
    status, alone, err = tiered("sweep", *GRID, "--json")
    assert status == 0, err
    out = tmp_path / "sweep.csv"
    status, spread, err = tiered("sweep", *GRID, "--json", "--ray", "--out", out)
    assert status == 0, err
    assert json.loads(spread) == json.loads(alone)  # in the grid's order
    lines = out.read_text().splitlines(keepends=True)
    out.write_text("".join(lines[:3]))  # stopped after two rows
    status, spread, err = tiered("sweep", *GRID, "--json", "--ray", "--out", out)
    assert json.loads(spread) == json.loads(alone)
    assert out.read_text().startswith("".join(lines[:3])) and len(rows_of(out)) == 4


def test_a_dying_worker_is_repeated(tmp_path):
    """The first time around, its process ends."""

    def square(number, mark):
        if number == 3 and not Path(mark).exists():
            Path(mark).touch()
            os._exit(1)
        return number * number

    mark = str(tmp_path / "died")
    assert dict(each(square, [(number, mark) for number in range(6)])) == {
        number: number * number for number in range(6)
    }
    assert Path(mark).exists()


def test_errors_are_one_line(tiered, tmp_path):
    status, _, err = tiered("sweep", "olmoe-1b-7b", "--gpu", "laptop", "--top-k", "99", "--ray")
    assert status == 1 and "top_k is 99" in err and "ray::" not in err
    model = random_tiny_model(tmp_path / "model")
    status, _, err = tiered("sweep", model, "--live", "--ray")
    assert status == 2 and "--live measures this machine" in err
