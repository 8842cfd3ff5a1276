"""`tiered look-ahead`: each predictor is scored, and a guess that is not stale is right."""

import json

import numpy as np
import pytest

pytest.importorskip("numba")

from tiered.demo import random_tiny_model
from tiered.experts import Routing
from tiered.tracing.look_ahead import MOST_USED, PREVIOUS, LookAheadWatch


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return random_tiny_model(tmp_path_factory.mktemp("model"))


def routing(*experts):
    chosen = np.array(experts, np.int32).reshape(-1, 2)
    return Routing(chosen, np.ones(chosen.shape, np.float32))


def test_each_predictor_is_scored_by_itself():
    watch = LookAheadWatch(num_layers=2, num_experts=4, most=1)
    for layer in range(2):  # a prompt: nothing is guessed, but it is remembered
        watch.observe(layer, routing([0, 1], [0, 2], [0, 3]))
        assert not watch.distances(layer)
    watch.observe(0, routing([0, 3]))
    assert list(watch.distances(0)) == [0, 1]
    watch.submit(0, routing([3, 0]))
    watch.submit(1, routing([2, 3]))
    watch.observe(1, routing([2, 1]))
    assert list(watch.distances(1)) == [0]
    watch.submit(1, routing([2, 1]))
    assert watch.total(0).whole == watch.total(0).tokens == 2
    assert watch.scores[1, 1] == (2, 1, 1, 0)
    assert watch.scores[0, PREVIOUS] == (2, 2, 1, 1) and watch.scores[1, PREVIOUS].named == 0
    assert watch.scores[0, MOST_USED].named == 1 and watch.scores[1, MOST_USED].named == 1


def test_a_model_is_watched_layer_by_layer(tiered, model):
    status, out, err = tiered("look-ahead", model, "abc", "-n", 6, "--layers", 1, "--json")
    assert status == 0, err
    found = json.loads(out)["predictors"]
    assert list(found) == ["0", "1", PREVIOUS, MOST_USED]
    assert found["0"]["slot_overlap"] == found["0"]["whole"] == 1
    assert "0" not in found["1"]["layers"]  # nobody can guess the first layer
    status, out, _ = tiered("look-ahead", model, "abc", "-n", 6, "--expert-ram", "60K")
    assert status == 0 and "100 / 100" in out and "most used" in out
