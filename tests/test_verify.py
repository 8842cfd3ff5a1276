"""`tiered verify`: the forecast's counts are the engine's counts; times are only reported."""

import json
from contextlib import ExitStack

import numpy as np
import pytest

pytest.importorskip("numba")

from tiered.demo import random_tiny_model
from tiered.engine import Engine
from tiered.measuring.chosen_experts import ChosenExperts, LapClock, Usage
from tiered.measuring.verify import verify


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return random_tiny_model(tmp_path_factory.mktemp("model"))


def test_hit_rates_are_forecast_exactly(model):
    found = verify(model, (1.0, 0.6, 0.4), prompt_tokens=8, num_tokens=8, runs=1, threads=1)
    assert [one.share for one in found.comparisons] == [1.0, 0.6, 0.4]
    for one in found.comparisons:
        assert one.forecast_hit_pct == pytest.approx(one.measured_hit_pct)
        assert one.forecast_tok_s > 0 and one.measured_tok_s > 0
        assert sum(one.forecast_terms.values()) == pytest.approx(1e3 / one.forecast_tok_s)
    assert found.comparisons[2].measured_hit_pct < 100
    assert found.worst_error_pct == max(abs(one.error_pct) for one in found.comparisons)


def test_the_command_prints_both_side_by_side(tiered, model):
    sizes = (
        "--prompt-tokens",
        8,
        "--tokens",
        6,
        "--runs",
        1,
        "--threads",
        1,
        "--shares",
        "100,50%",
    )
    status, out, err = tiered("verify", model, *sizes)
    assert status == 0, err
    for word in ("forecast", "measured", "error", "hit rate", "waiting", "50% of the experts"):
        assert word in out
    status, out, _ = tiered("verify", model, *sizes, "--json")
    ((got,), worst) = json.loads(out).values()
    assert status == 0 and len(got["comparisons"]) == 2
    assert worst == max(abs(one["error_pct"]) for one in got["comparisons"])


def test_a_source_gives_as_many_hits_and_misses_as_are_wanted(model):
    with ExitStack() as stack:
        engine = stack.enter_context(Engine(model, expert_ram="100K", look_ahead=0, threads=1))
        clock = LapClock(engine.backend.chained_seconds)
        chosen = ChosenExperts(engine, Usage(misses=0.5, reuse=0.5), clock, stack)
        for layer in engine.config.sparse_layers:  # a prompt brings in what stays
            ((ready, addresses),) = chosen.fetch(layer, np.arange(5))
            assert len(ready) == len(addresses) == 5
        chosen.prepare(20)
        seen = set()
        for _ in range(20):
            kinds = [choice.kind for choice in chosen.coming]
            before = chosen.tier.stats
            for kind, layer in zip(kinds, engine.config.sparse_layers, strict=True):
                assert sum(len(ready) for ready, _ in chosen.fetch(layer, np.arange(2))) == sum(
                    kind
                )
            found = chosen.tier.stats - before
            assert found.hits == sum(kind.hits for kind in kinds)
            assert found.misses == sum(kind.misses for kind in kinds)
            seen |= set(kinds)
        assert {chosen.all_there, chosen.one_missing, chosen.several_missing} <= seen


def test_several_models_in_one_table(tiered, model):
    sizes = ("--prompt-tokens", 8, "--tokens", 6, "--runs", 1, "--threads", 1, "--shares", "100")
    status, out, err = tiered("verify", model, model, *sizes)
    assert status == 0, err
    summary = out[out.index("forecast tokens/s") :]
    assert summary.count(model.name) == 2 and "worst error" in summary


@pytest.mark.parametrize(
    ("shares", "message"), [("half", "numbers"), ("0", "above 0"), ("120", "at most 100")]
)
def test_mistakes_get_one_line(tiered, model, shares, message):
    status, _, err = tiered("verify", model, "--shares", shares)
    assert status != 0 and message in err and "Traceback" not in err
