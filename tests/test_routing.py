"""Rules for routing: what is dropped costs nothing and leaves no trace in what is computed."""

import json

import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from instructions import AS_ON_A_GPU
from naive import NaiveBackend

from tiered import Engine
from tiered.experts import ExpertKey, Routing, group_by_expert, group_kept
from tiered.quality.perplexity import measure_perplexity
from tiered.routing import Cold, Cut, RoutingRules, keep, kept_experts
from tiered.tracing.trace import PREFILL, Fetched, Routed, TraceInfo, TraceWriter, read_trace

IDS = np.random.default_rng(0).integers(3, 300, 60).tolist()
RULES = [
    dict(expert_top_k=2), dict(expert_top_p=0.5), dict(expert_min_weight=0.6),
    dict(expert_top_k=3, expert_top_p=0.9, expert_min_weight=0.3),
]  # fmt: skip


@pytest.fixture(scope="module", params=["mixtral", "olmoe"])
def model(request, tmp_path_factory):
    """Four experts of eight per token; mixtral normalizes their weights, olmoe does not."""
    folder = tmp_path_factory.mktemp(request.param)
    return tiny.hf_checkpoint(folder / "hf", request.param, "f32", tokenizer=True, top_k=4)


def logits(model, ids=IDS, **choices):
    with Engine(model, threads=2, **choices) as engine:
        return engine.logits(ids)


def tokens(model, **choices):
    with Engine(model, threads=2, **choices) as engine:
        return list(engine.generate_tokens(IDS[:9], 24)), engine.stats


# --- cuts ---


def naive_cut(experts, weights, cut, normalize):
    """{expert: weight} of one token."""
    left = [(e, w) for e, w in zip(experts, weights, strict=True) if w > 0][: cut.top_k]
    if cut.top_p < 1:
        ranked, kept, sum_ = sorted(left, key=lambda pair: -pair[1]), [], 0.0
        for expert, weight in ranked:
            if sum_ < cut.top_p * sum(w for _, w in left):
                kept.append(expert)
            sum_ += weight
        left = [pair for pair in left if pair[0] in kept]
    left = [(e, w) for e, w in left if w >= cut.min_weight * max(w for _, w in left)]
    factor = weights.sum() / sum(w for _, w in left) if normalize else 1.0
    return {e: w * factor for e, w in left}


@settings(deadline=None)
@given(
    seed=st.integers(0, 10_000),
    shape=st.tuples(st.integers(1, 6), st.integers(1, 8)),
    cut=st.builds(
        Cut,
        st.none() | st.integers(1, 8),
        st.sampled_from([0.1, 0.5, 0.93, 1.0]),
        st.sampled_from([0.0, 0.2, 0.7, 1.0]),
    ),
    normalize=st.booleans(),
)
def test_a_cut_is_what_the_rules_say(seed, shape, cut, normalize):
    random = np.random.default_rng(seed)
    experts = np.stack([random.permutation(12)[: shape[1]] for _ in range(shape[0])])
    weights = random.random(shape).astype(np.float32) + np.float32(0.01)
    weights = weights if seed % 2 else -np.sort(-weights, axis=1)  # some routers rank otherwise
    routing = Routing(experts.astype(np.int32), weights)
    got = keep(routing, kept_experts(weights, cut), normalize)
    assert got.experts.dtype == np.int32 and got.weights.dtype == np.float32
    for row in range(shape[0]):
        expected = naive_cut(experts[row], weights[row], cut, normalize)
        kept = got.weights[row] > 0
        found = dict(zip(got.experts[row][kept], got.weights[row][kept], strict=True))
        assert found == pytest.approx(expected, rel=1e-5) and len(found) >= 1
        assert set(got.experts[row]) == set(expected)  # what is dropped is not even named
    if shape[0] == 1:
        assert (got.weights > 0).all()


def test_what_takes_nothing_away_changes_nothing():
    routing = Routing(np.array([[3, 1]], np.int32), np.array([[0.7, 0.3]], np.float32))
    kept = kept_experts(routing.weights, Cut(2, 0.99, 0.1))
    assert keep(routing, kept, True) is routing


def test_jobs_leave_out_pairs_without_weight():
    routing = Routing(
        np.array([[3, 1], [1, 1], [0, 3]], np.int32),
        np.array([[0.7, 0.3], [1.0, 0.0], [0.6, 0.4]], np.float32),
    )
    jobs, dropped = group_kept(routing)
    assert jobs.experts.tolist() == [0, 1, 3] and dropped.tolist() == [3]
    assert jobs.pairs.tolist() == [4, 1, 2, 0, 5] and jobs.starts.tolist() == [0, 1, 3, 5]
    whole = routing._replace(weights=np.ones((3, 2), np.float32))
    for ours, theirs in zip(group_kept(whole)[0], group_by_expert(whole), strict=True):
        assert ours.dtype == theirs.dtype and np.array_equal(ours, theirs)


def test_what_was_used_most_and_lately_comes_last():
    experts = np.random.default_rng(0).integers(0, 300, (20_000, 4), np.int32)
    flat, jobs = experts.reshape(-1), group_by_expert(Routing(experts, np.ones(experts.shape)))
    assert sorted(jobs.experts.tolist()) == sorted(set(flat.tolist()))
    uses = [0.0] * 300
    for age, row in enumerate(experts[::-1].tolist()):
        for expert in row:
            uses[expert] += 0.5 ** (age // 16)
    ordered = [uses[expert] for expert in jobs.experts]
    assert np.all(np.diff(ordered) >= -1e-9) and ordered[-1] > ordered[0]
    for expert, begin, end in zip(jobs.experts, jobs.starts, jobs.starts[1:], strict=False):
        assert jobs.pairs[begin:end].tolist() == np.flatnonzero(flat == expert).tolist()
    assert jobs.starts[0] == 0 and jobs.starts[-1] == len(jobs.pairs) == flat.size


# --- the engine ---


def test_without_a_rule_there_is_no_rule(model):
    with Engine(model, threads=2) as engine:
        assert engine.decoder.rules is None
        expected = engine.logits(IDS)
    assert np.array_equal(logits(model, expert_top_k=4), expected)  # takes nothing away


@pytest.mark.parametrize("quantize", ["none", "int4"])
def test_fewer_experts_are_those_of_a_model_that_chooses_fewer(model, tmp_path, quantize):
    config = json.loads((model / "config.json").read_text())
    fewer = tiny.hf_checkpoint(
        tmp_path / "fewer", config["model_type"], "f32",
        config={"num_experts_per_tok": 2},
    )  # fmt: skip
    expected = logits(fewer, quantize=quantize)
    got = logits(model, quantize=quantize, expert_top_k=2)
    if config["model_type"] == "olmoe":
        assert np.array_equal(got, expected)
    else:  # weights are divided by their sum twice, which may round
        assert np.abs(got - expected).max() <= 2e-2 * np.ptp(expected)
        if quantize == "none":
            assert np.abs(got - expected).max() <= 1e-5 * np.ptp(expected)


class Poisoned(NaiveBackend):
    """What nobody computes is not a number."""

    def pair_outputs(self, num_pairs):
        return np.full_like(super().pair_outputs(num_pairs), np.nan)


@pytest.mark.parametrize("rules", RULES, ids=str)
def test_rows_that_nobody_computes_are_not_read(model, rules):
    got = logits(model, quantize="none", backend=Poisoned(), **rules)
    expected = logits(model, quantize="none", kv_dtype="f32", **rules)
    assert np.isfinite(got).all()
    assert np.abs(got - expected).max() <= 1e-5 * np.ptp(expected)
    assert not np.allclose(got, logits(model, quantize="none", kv_dtype="f32"))


@pytest.mark.parametrize("rules", RULES, ids=str)
def test_budget_and_look_ahead_do_not_change_the_tokens(model, rules):
    expected, _ = tokens(model, look_ahead=0, **rules)
    with Engine(model) as engine:
        budget = engine.plan.experts // 2
    for look_ahead in (0, 2):
        got, stats = tokens(model, expert_ram=budget, look_ahead=look_ahead, **rules)
        assert got == expected and stats.misses > 0


@pytest.mark.parametrize("rules", RULES, ids=str)
def test_what_is_dropped_is_not_fetched(model, tmp_path, rules):
    file = tmp_path / "trace"
    with Engine(model, threads=2, look_ahead=0, **rules) as engine, engine.record(file):
        list(engine.generate_tokens(IDS[:9], 24))
    fetched, used = [], []
    for event in read_trace(file).events:
        if isinstance(event, Fetched):
            fetched.append({key.expert for key in event.keys})
        if isinstance(event, Routed):
            kept = event.routing.weights > 0
            used.append(set(event.routing.experts[kept].tolist()))
    assert fetched == used
    decoded = sum(map(len, used[2:]))
    assert decoded < 4 * len(used[2:])
    if rules == dict(expert_top_k=2):
        assert decoded == 2 * len(used[2:])


@pytest.mark.parametrize("rules", RULES[1:3], ids=str)
def test_guesses_follow_the_rules(model, rules):
    """Otherwise what is dropped would be read ahead."""
    with Engine(model, threads=2, expert_ram=1 << 17, **rules) as engine:
        submitted = []
        prefetcher = engine.prefetcher
        submit = prefetcher.submit
        prefetcher.submit = lambda layer, guess: (submitted.append(guess), submit(layer, guess))
        list(engine.generate_tokens(IDS[:1], 24))
        prefetcher.accuracy  # noqa: B018  it is counted with any width
    assert submitted and all((guess.weights > 0).all() for guess in submitted)
    assert any(guess.experts.shape[1] < 4 for guess in submitted)


def test_a_simulated_gpu_drops_the_same(model):
    pytest.importorskip("torch")
    rules = dict(expert_top_p=0.5)
    got = logits(model, device="sim", **rules)
    expected = logits(model, isa=AS_ON_A_GPU, **rules)
    assert np.abs(got - expected).max() <= 2e-2 * np.ptp(expected)


# --- recorded routing ---


def record(model, file, **choices):
    with Engine(model, threads=2, quantize="none", **choices) as engine, engine.record(file):
        return measure_perplexity(engine, IDS, 32, 16)


def test_a_recorded_routing_is_used_again(model, tmp_path):
    file, again = tmp_path / "a.trace", tmp_path / "b.trace"
    own = record(model, file)
    got = record(model, again, routing=file)
    assert got.losses == pytest.approx(own.losses, abs=5e-3)  # weights are recorded as float16
    first, second = (
        [e.routing for e in read_trace(path).events if isinstance(e, Routed)]
        for path in (file, again)
    )
    assert all(np.array_equal(a.experts, b.experts) for a, b in zip(first, second, strict=True))
    assert all(np.array_equal(a.weights, b.weights) for a, b in zip(first, second, strict=True))


def test_another_model_goes_the_recorded_way(model, tmp_path):
    file, again = tmp_path / "a.trace", tmp_path / "b.trace"
    kind = json.loads((model / "config.json").read_text())["model_type"]
    other = tiny.hf_checkpoint(tmp_path / "other", kind, "f32", seed=7, top_k=2)
    record(model, file)
    record(other, again, routing=file, expert_top_k=2)
    events = zip(read_trace(file).events, read_trace(again).events, strict=True)
    pairs = [(a.routing, b.routing) for a, b in events if isinstance(a, Routed)]
    assert pairs and all(np.array_equal(a.experts[:, :2], b.experts) for a, b in pairs)


def test_a_trace_of_something_else_is_refused(model, tmp_path):
    file = tmp_path / "a.trace"
    record(model, file)
    with Engine(model, threads=2, routing=file) as engine:
        with pytest.raises(ValueError, match="suits only the text"):
            engine.logits(IDS[:9])
        engine.logits(IDS[:31])  # the pass that failed was not taken
    dense = tiny.hf_checkpoint(tmp_path / "dense", "llama")
    with pytest.raises(ValueError, match="dense"):
        Engine(dense, routing=file)
    deeper = tiny.hf_checkpoint(tmp_path / "deeper", layers=3)
    with pytest.raises(ValueError, match="another model"):
        Engine(deeper, routing=file)
    fewer = tiny.hf_checkpoint(tmp_path / "fewer", experts=4)
    with pytest.raises(ValueError, match="another model"):
        Engine(fewer, routing=file)


@pytest.mark.parametrize(
    ("experts", "weights"),
    [([3, 3], [0.5, 0.5]), ([3, 1], [0.0, 0.0]), ([3, 1], [np.nan, 1]), ([3, 9], [0.5, 0.5])],
)
def test_a_damaged_trace_is_refused(model, tmp_path, experts, weights):
    file = tmp_path / "a.trace"
    routing = Routing(np.array([experts], np.int32), np.array([weights], np.float32))
    with TraceWriter(file, TraceInfo("x", 8, 2, (1, 1))) as writer:
        writer.begin(1)
        for layer in range(2):
            writer.record(layer, np.zeros(1), routing)
    with pytest.raises(ValueError, match="damaged"):
        Engine(model, routing=file)
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(ValueError, match="no whole forward pass"):
        Engine(model, routing=file)


# --- a table of routes ---


def table(path, **layers):
    path.write_text(json.dumps({"routing": {name[1:]: route for name, route in layers.items()}}))
    return path


def test_a_table_is_a_trace_that_always_says_the_same(model, tmp_path):
    routes = {0: ([5, 2], [0.75, 0.25]), 1: ([1], [1.0])}
    with TraceWriter(tmp_path / "a.trace", TraceInfo("x", 8, 2, (1, 1))) as writer:
        writer.begin(PREFILL)
        for layer, (experts, weights) in routes.items():
            routing = Routing(
                np.tile(np.array(experts, np.int32), (9, 1)),
                np.tile(np.array(weights, np.float32), (9, 1)),
            )
            writer.record(layer, np.arange(9), routing)
    file = table(
        tmp_path / "a.json",
        l0={"experts": [5, 2], "weights": [0.75, 0.25]},
        l1={"experts": [1]},  # equal shares of 1
    )
    with (
        Engine(model, threads=2, routing=tmp_path / "a.trace") as recorded,
        Engine(model, threads=1, routing=file) as fixed,
    ):
        assert recorded.is_of_one_text and not fixed.is_of_one_text
        assert np.array_equal(recorded.logits(IDS[:9]), fixed.logits(IDS[:9]))
        assert len(list(fixed.generate_tokens(IDS[:9], 5))) == 5


def test_layers_that_a_table_does_not_name_route_as_ever(model, tmp_path):
    with Engine(model, threads=2) as engine, engine.record(tmp_path / "own"):
        engine.logits(IDS[:9])
    file = table(tmp_path / "a.json", l1={"experts": [6, 0], "weights": [0.5, 0.5]})
    with Engine(model, threads=2, routing=file) as engine, engine.record(tmp_path / "fixed"):
        engine.logits(IDS[:9])
    own, fixed = (
        {e.layer: e.routing for e in read_trace(tmp_path / n).events if isinstance(e, Routed)}
        for n in ("own", "fixed")
    )
    assert np.array_equal(own[0].experts, fixed[0].experts)
    assert (fixed[1].experts == [6, 0]).all() and (own[1].experts[:, :2] != [6, 0]).any()


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ({}, "neither a trace nor a table"),
        ({"l7": {"experts": [0]}}, "no experts in a layer '7'"),
        ({"l0": {"experts": []}}, "1 to 4 different experts"),
        ({"l0": {"experts": [1, 1]}}, "1 to 4 different experts"),
        ({"l0": {"experts": [8]}}, "numbered 0 to 7"),
        ({"l0": [1]}, "1 to 4 different experts"),
        ({"l0": {"experts": [1, 2], "weights": [1]}}, "a weight above 0 for each"),
        ({"l0": {"experts": [1], "weights": [float("nan")]}}, "a weight above 0 for each"),
    ],
)
def test_tables_that_make_no_sense_are_refused(model, tmp_path, layers, message):
    with pytest.raises(ValueError, match=message):
        Engine(model, routing=table(tmp_path / "a.json", **layers))


# --- the commands ---


def test_ppl_and_compare_show_the_price(model, tiered, tmp_path):
    text, trace = tmp_path / "text.txt", tmp_path / "a.trace"
    text.write_text("the rain in the north, and then the heat " * 8)
    common = ("--text", text, "--window", 32, "--threads", 2, "--json")
    found = {}
    for name, more in dict(whole=[], less=["--top-k", 1], record=["--record", trace],
                           routed=["--routing", trace]).items():  # fmt: skip
        status, out, err = tiered("ppl", model, *common, *more)
        assert status == 0, err
        found[name] = json.loads(out)["perplexity"]
    assert found["whole"] == found["record"] != found["less"]
    assert found["routed"] == pytest.approx(found["whole"], rel=0.02)
    status, out, err = tiered("compare", model, "--b", "top-k=1", *common, "--generate", 4)
    assert status == 0, err
    report = json.loads(out)
    assert report["perplexity_b"] == pytest.approx(found["less"]) and report["kl_mean"] > 0
    # Layer 0 sees the same input: of four experts, one is left.
    assert report["routing_agreement_by_layer"]["0"] == pytest.approx(0.25)
    status, out, err = tiered("compare", model, "--b", f"routing={trace}", *common)
    assert status == 0, err
    assert json.loads(out)["kl_mean"] < report["kl_mean"] and "drift" not in json.loads(out)
    status, _, err = tiered("compare", model, "--b", f"routing={trace}", *common, "--generate", 3)
    assert status == 2 and "--generate" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--top-k", 5], "choose 4"),
        (["--top-k", 0], "--expert-top-k"),
        (["--top-p", 0], "--expert-top-p"),
        (["--min-weight", 2], "--expert-min-weight"),
        (["--routing", "/no/such/trace"], "/no/such/trace"),
    ],
    ids=str,
)
def test_mistakes_get_one_line(model, tiered, tmp_path, arguments, message):
    text = tmp_path / "text.txt"
    text.write_text("the rain")
    status, _, err = tiered("ppl", model, "--text", text, *arguments)
    assert status != 0 and message in err and "Traceback" not in err


@pytest.mark.parametrize(
    "choices", [dict(expert_top_p=0), dict(expert_min_weight=1.5), dict(expert_top_k=0)], ids=str
)
def test_choices_are_checked_once(model, choices):
    with pytest.raises(ValueError, match=next(iter(choices))):
        Engine(model, **choices)


# --- experts that would have to be read ---


def test_cold_experts_are_skipped_only_if_they_are_light_and_not_in_memory():
    experts = np.array([[3, 1, 2], [5, 6, 7]], np.int32)
    weights = np.array([[0.6, 0.3, 0.1], [0.5, 0.3, 0.2]], np.float32)
    resident = {ExpertKey(4, 2), ExpertKey(4, 5), ExpertKey(4, 7)}
    cold = Cold(0.55, resident.__contains__)
    kept = cold.kept(4, Routing(experts, weights))
    # 0.6 * 0.55 = 0.33: 1 is light and cold, 2 in memory; 0.275: 6 is cold, but not light.
    assert kept.tolist() == [[True, False, True], [True, True, True]]
    assert cold.skipped == 1 and cold.skipped_weight == pytest.approx(0.3)
    assert cold.weight == pytest.approx(2)
    rules = RoutingRules(Cut(), True, cold=Cold(0.55, resident.__contains__))
    got = rules.apply(4, Routing(experts, weights))
    assert got.weights[0] == pytest.approx([0.6 / 0.7, 0, 0.1 / 0.7])
    assert (got.experts[got.weights > 0] == experts[kept]).all()
    assert rules.apply(4, Routing(experts, weights), is_guess=True).weights is weights
    many = Routing(np.repeat(experts, 9, axis=0), np.repeat(weights, 9, axis=0))
    assert rules.apply(4, many) is many  # a prompt


def test_dropping_cold_experts_reads_less_and_says_so(model):
    with Engine(model, threads=2) as engine:
        expected = list(engine.generate_tokens(IDS[:9], 24))
        budget = engine.plan.experts // 3
    results = {}
    for ratio in (0.0, 0.5, 1.0):
        with Engine(model, threads=2, expert_ram=budget, drop_cold=ratio, look_ahead=0) as engine:
            got = list(engine.generate_tokens(IDS[:9], 24))
            results[ratio] = engine.stats
            assert ratio or got == expected
            assert bool(engine.stats.skipped_experts) == bool(ratio)
    assert results[1.0].skipped_experts > results[0.5].skipped_experts
    assert results[1.0].bytes_read < results[0.5].bytes_read < results[0.0].bytes_read
    assert 0 < results[0.5].skipped_weight < 0.5 * results[0.5].routed_weight
    mapped = [tokens(model, quantize="none", drop_cold=ratio) for ratio in (0.0, 1.0)]
    assert mapped[0][0] == mapped[1][0]  # all is in memory: nothing is cold
    assert mapped[1][1].skipped_experts == 0 < mapped[1][1].routed_weight
    with pytest.raises(ValueError, match="drop_cold must lie in 0"):
        Engine(model, drop_cold=1.5)
