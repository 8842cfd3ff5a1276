"""Experts per token by layer: measured on a text, kept in a table, obeyed by the engine."""

import json
from itertools import product

import numpy as np
import pytest
import tiny

from tiered import Engine
from tiered.backend import open_backend
from tiered.config import EngineConfig
from tiered.formats import open_checkpoint
from tiered.layer_k import read_layer_k, write_layer_k
from tiered.quality.layer_errors import LayerErrors, allocate, errors_of_fewer
from tiered.quality.layer_tap import read
from tiered.tracing.trace import Routed, read_trace

IDS = np.random.default_rng(0).integers(3, 300, 60).tolist()
TEXT = "the rain in the north, and then the heat " * 8


@pytest.fixture(scope="module", params=["mixtral", "olmoe"])
def model(request, tmp_path_factory):
    """Four experts of eight per token; mixtral normalizes their weights, olmoe does not."""
    folder = tmp_path_factory.mktemp(request.param)
    return tiny.hf_checkpoint(folder / "hf", request.param, "f32", tokenizer=True, top_k=4)


def config_of(model):
    with open_checkpoint(model) as checkpoint:
        return checkpoint.config


def table(model, folder, layer_k):
    write_layer_k(folder / "table.json", layer_k, config_of(model), {})
    return folder / "table.json"


# --- errors and who may have how many ---


@pytest.mark.parametrize("normalize", [False, True])
def test_errors_of_fewer_experts(normalize):
    random = np.random.default_rng(1)
    out = random.standard_normal((5, 4, 7)).astype(np.float32)
    weights = random.random((5, 4)).astype(np.float32)
    got = errors_of_fewer(out, weights, normalize)
    for token, k in product(range(5), range(1, 5)):
        first = weights[token, :k]
        if normalize:
            first = first * weights[token].sum() / first.sum()
        moved = weights[token] @ out[token] - first @ out[token, :k]
        assert got[token, k - 1] == pytest.approx((moved**2).sum(), rel=1e-4, abs=1e-9)
    assert (got[:, -1] == 0).all()


def test_the_table_of_the_least_error():
    """Against all tables there are; errors shrink less and less, as they mostly do."""
    random = np.random.default_rng(2)
    for average in (1, 1.5, 1.75, 2.25, 3):
        steps = -np.sort(-random.random((4, 2)), axis=1)
        errors = np.concatenate([steps[:, ::-1].cumsum(axis=1)[:, ::-1], np.zeros((4, 1))], axis=1)
        got = allocate(errors, range(4), average)
        allowed = [t for t in product((1, 2, 3), repeat=4) if sum(t) == round(average * 4)]
        best = min(allowed, key=lambda t: sum(errors[i, k - 1] for i, k in enumerate(t)))
        assert tuple(got.values()) == best
    assert allocate(errors, [1, 3], 3) == {1: 3, 3: 3}
    for average in (0.9, 3.1):
        with pytest.raises(ValueError, match="lie in 1"):
            allocate(errors, range(4), average)


def test_a_tapped_engine_says_the_same_and_hears_what_rules_change(model):
    choices = dict(threads=2, quantize="none", kv_dtype="f32")
    config = config_of(model)
    tap = LayerErrors(open_backend(EngineConfig(**choices)), config)
    with Engine(model, backend=tap, **choices) as engine, Engine(model, **choices) as plain:
        assert np.array_equal(engine.logits(IDS), plain.logits(IDS))
        assert tap.num_tokens == len(IDS)
        read(engine, IDS, lambda done, total: None)
        assert tap.num_tokens == 2 * len(IDS)
    assert (tap.errors[:, :-1] > tap.errors[:, 1:]).all() and (tap.errors[:, -1] == 0).all()

    # In the first layer, what an engine with the rule adds differs by just that error.
    added = []
    for rules in ({}, {"expert_top_k": 2}):

        class Kept(LayerErrors):
            def combine(self, x, out, weights):
                before = x.copy()
                self._backend.combine(x, out, weights)
                if self._layer == 0:
                    added.append((before, x - before))

        backend = Kept(open_backend(EngineConfig(**choices)), config)
        with Engine(model, backend=backend, **choices, **rules) as engine:
            engine.logits(IDS)
    (before, whole), (_, fewer) = added
    error = np.square(whole - fewer).sum() / np.square(before).sum()
    assert tap.errors[0, 1] == pytest.approx(error, rel=1e-3)


# --- the engine ---


def test_every_layer_has_its_number(model, tmp_path):
    file = table(model, tmp_path, {0: 1, 1: 3})
    for more, expected in (({}, {0: 1, 1: 3}), ({"expert_top_k": 2}, {0: 1, 1: 2})):
        trace = tmp_path / f"{len(more)}.trace"
        with Engine(model, threads=2, expert_layer_k=file, **more) as engine:
            with engine.record(trace):
                list(engine.generate_tokens(IDS[:9], 12))
            stats = engine.stats
        used = [event for event in read_trace(trace).events if isinstance(event, Routed)]
        assert {event.layer: event.routing.experts.shape[1] for event in used} == expected
        share = 1 - sum(expected.values()) / 8
        assert stats.dropped_share == pytest.approx(share)
        assert 0 < stats.dropped_weight_share < share  # the lightest ones go


def test_a_uniform_table_is_the_plain_rule(model, tmp_path):
    with (
        Engine(model, threads=2, expert_layer_k=table(model, tmp_path, {0: 2, 1: 2})) as ours,
        Engine(model, threads=2, expert_top_k=2) as plain,
        Engine(model, threads=2, expert_top_p=1.0) as whole,
    ):
        assert np.array_equal(ours.logits(IDS), plain.logits(IDS))
        assert ours.stats.dropped_experts == plain.stats.dropped_experts == 2 * 2 * len(IDS)
        whole.logits(IDS)
        assert whole.stats.chosen_experts == whole.stats.dropped_experts == 0  # nobody counts


# --- tables ---


def test_a_table_of_another_model_is_refused(model, tmp_path):
    kind = json.loads((model / "config.json").read_text())["model_type"]
    deeper = tiny.hf_checkpoint(tmp_path / "deeper", kind, layers=3, top_k=4)
    fewer = tiny.hf_checkpoint(tmp_path / "fewer", kind, experts=6, top_k=4)
    less = tiny.hf_checkpoint(tmp_path / "less", kind, top_k=2)
    for other, what in ((deeper, "layers"), (fewer, "num_experts"), (less, "top_k")):
        layers = config_of(other).num_layers
        file = table(other, tmp_path, dict.fromkeys(range(layers), 2))
        with pytest.raises(ValueError, match=f"another model.*{what}"):
            Engine(model, expert_layer_k=file)
    dense = tiny.hf_checkpoint(tmp_path / "dense", "llama")
    with pytest.raises(ValueError, match="dense"):
        Engine(dense, expert_layer_k=table(model, tmp_path, {0: 1, 1: 1}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"0": 0}, "layer 0 has 0"),
        ({"1": 5}, "layer 1 has 5, not 1 to 4"),
        ({"1": 1.5}, "layer 1 has 1.5"),
        ({"1": True}, "layer 1 has True"),
        ({"2": 1}, "3 layers"),
        (None, "no table"),
    ],
    ids=str,
)
def test_a_damaged_table_is_refused(model, tmp_path, change, message):
    file = table(model, tmp_path, {0: 1, 1: 1})
    values = json.loads(file.read_text())
    values["layer_k"] = change and values["layer_k"] | change
    file.write_text(json.dumps(values))
    with pytest.raises(ValueError, match=message):
        read_layer_k(file, config_of(model))
    file.write_text("{")
    with pytest.raises(ValueError, match="damaged JSON"):
        read_layer_k(file, config_of(model))


# --- the commands ---


def test_the_command_makes_what_the_option_takes(model, tiered, tmp_path):
    text, file = tmp_path / "text.txt", tmp_path / "k.json"
    text.write_text(TEXT)
    status, out, err = tiered("layer-k", model, file, "--average", 2.5, "--text", text,
                              "--threads", 2, "--json")  # fmt: skip
    assert status == 0, err
    report = json.loads(out)
    layer_k = read_layer_k(file, config_of(model))
    assert {int(layer): k for layer, k in report["layer_k"].items()} == layer_k
    assert report["average"] == 2.5 and sum(layer_k.values()) == 5
    common = ("--text", text, "--threads", 2)
    status, out, err = tiered("ppl", model, *common, "--layer-k", file, "--json")
    assert status == 0 and json.loads(out)["dropped"] == pytest.approx(1 - 2.5 / 4), err
    status, out, err = tiered("ppl", model, *common, "--layer-k", file)
    assert status == 0 and "rules drop 37.5% of the experts" in out, err
    status, out, err = tiered("compare", model, "--b", f"layer-k={file}", *common,
                              "--generate", 4)  # fmt: skip
    assert status == 0 and "rules drop 37.5%" in out and f"expert_layer_k={file}" in out, err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--average", 4], "4 experts per token"),
        (["--average", 0.5], "--average"),
        (["--average", 2, "--text", "/no/such/text"], "/no/such/text"),
        (["--average", 2, "--device", "sim"], "leave --device out"),
        ([], "--average"),
    ],
    ids=str,
)
def test_mistakes_get_one_line(model, tiered, tmp_path, arguments, message):
    text, file = tmp_path / "text.txt", tmp_path / "k.json"
    text.write_text(TEXT)
    status, _, err = tiered("layer-k", model, file, "--text", text, *arguments)
    assert status != 0 and message in err and "Traceback" not in err and not file.exists()
    status, _, err = tiered("ppl", model, "--text", text, "--layer-k", tmp_path / "none")
    assert status != 0 and "none is missing" in err


@pytest.mark.parametrize("command", ["run", "chat", "bench", "serve", "batch", "trace", "ppl"])
def test_every_command_that_computes_takes_the_rules(tiered, command):
    status, out, _ = tiered(command, "--help")
    assert status == 0
    for name in ("--expert-top-k", "--layer-k", "--expert-top-p", "--min-weight"):
        assert name in out
    assert ("--routing" in out) == (command in ("run", "ppl"))


@pytest.mark.parametrize("command", ["run", "chat", "bench", "serve", "batch", "trace"])
def test_rules_reach_the_engine(model, tiered, tmp_path, command):
    requests = tmp_path / "in.jsonl"
    body = {"messages": [{"role": "user", "content": "rain"}], "max_tokens": 2}
    requests.write_text(json.dumps({"custom_id": "a", "url": "/v1/chat/completions", "body": body}))
    arguments = {
        "run": [model, "the rain"], "chat": [model], "bench": [model],
        "serve": [model, "--port", 0],
        "batch": [requests, tmp_path / "out.jsonl", model], "trace": [model, "the rain"],
    }[command]  # fmt: skip
    status, _, err = tiered(command, *arguments, "--expert-top-k", 5)
    assert status == 1 and "routers choose 4" in err and "Traceback" not in err


def test_rules_are_obeyed_and_told(model, tiered, tmp_path):
    common = ("--threads", 2, "--expert-top-k", 1)
    status, out, err = tiered("run", model, "the rain", "--raw", "-n", 8, *common, "--top-k", 3)
    assert status == 0 and "rules drop 75.0% of the experts" in err, err
    status, out, err = tiered("run", model, "the rain", "--raw", "-n", 8, *common, "--json")
    assert status == 0 and json.loads(out)["dropped_experts"] > 0, err
    bench = ("bench", model, "--prefill", 8, "--decode", 4)
    status, out, err = tiered(*bench, *common, "--json")
    assert status == 0 and json.loads(out)["dropped"] == 0.75, err
    status, whole, err = tiered(*bench, "--threads", 2, "--json")
    names = ("weights_gb_per_token", "dropped")
    ours, theirs = ([json.loads(text)[name] for name in names] for text in (out, whole))
    assert ours[0] < theirs[0] and theirs[1] == 0
    assert "rules drop 75.0%" in tiered(*bench, *common)[1]


def test_a_recorded_answer_can_be_routed_again(model, tiered, tmp_path):
    """Another seed of sampling does not matter: what is said may differ, the experts do not."""
    trace, again = tmp_path / "a.trace", tmp_path / "b.trace"
    status, _, err = tiered("trace", model, "the rain", "-o", trace, "-n", 8, "--threads", 2)
    assert status == 0, err
    common = ("run", model, "the rain", "--raw", "--threads", 2, "--routing")
    status, _, err = tiered(*common, trace, "-n", 6)
    assert status == 0, err
    status, _, err = tiered(*common, trace, "-n", 30)
    assert status == 1 and "suits only" in err and "Traceback" not in err
    with Engine(model, threads=2, routing=trace) as engine, engine.record(again):
        list(engine.generate_tokens(engine.tokenizer.encode("the rain"), 8))
    first, second = (
        [e.routing.experts.tolist() for e in read_trace(path).events if isinstance(e, Routed)]
        for path in (trace, again)
    )
    assert first == second
