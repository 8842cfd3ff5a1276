"""Comparisons: of a model with itself nothing differs; of two, what plain NumPy says."""

import json

import numpy as np
import pytest
import tiny

from tiered import Engine
from tiered.quality import compare as comparing
from tiered.quality.compare import compare, compare_generations, compare_text, shared_experts
from tiered.quality.saved import SavedSide, is_saved, save
from tiered.quality.side import LiveSide, TextPlan
from tiered.quality.tasks import Task, answer_task, choice_score, read_tasks
from tiered.quality.windows import cut
from tiered.text.sampling import log_softmax
from tiered.tracing.trace import Routed, read_trace

IDS = tuple(np.random.default_rng(0).integers(3, 300, 90).tolist())
PLAN = TextPlan(IDS, 40, 20, 8, 12)
TASKS = (Task("the rain in", ("the north", "a then"), 0), Task("and", ("the heat", "in", "an"), 2))
TEXT = "the rain in the north, and then the heat: é ≤ 漢字. " * 6


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return [
        tiny.hf_checkpoint(folder / str(seed), "mixtral", "f32", seed=seed, tokenizer=True)
        for seed in (0, 1)
    ]


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text(TEXT, encoding="utf-8")
    return file


def live(engine):
    return LiveSide(engine, "tiny", {})


def test_a_model_is_itself(models):
    with Engine(models[0], threads=2) as a, Engine(models[0], threads=1) as b:
        report = compare(live(a), live(b), PLAN._replace(tasks=TASKS))
    assert report["kl_mean"] == report["kl_max"] == report["kl_99"] == 0.0
    assert report["perplexity_ratio"] == 1.0 and report["perplexity_ratio_interval"] == [1.0, 1.0]
    assert report["top_1_agreement"] == report["routing_agreement"] == 1.0
    assert set(report["routing_agreement_by_layer"].values()) == {1.0}
    assert report["drift"] == {"generated": 12, "first_difference": None, "agreement": 1.0}
    assert report["tasks"]["same_choice"] == 1.0
    assert report["tasks"]["accuracy_a"] == report["tasks"]["accuracy_b"]


def test_two_models_differ_as_plain_numpy_says(models):
    plan = PLAN._replace(size=len(IDS), stride=len(IDS))
    with Engine(models[0], threads=2) as a, Engine(models[1], threads=2) as b:
        p, q = (log_softmax(engine.logits(IDS[:-1])) for engine in (a, b))
        found = compare_text(live(a), live(b), plan)
    kl = (np.exp(p) * (p - q)).sum(axis=1)
    assert found.divergence == pytest.approx(kl)
    assert kl.min() > 0
    rows, following = np.arange(len(IDS) - 1), np.array(IDS[1:])
    assert found.losses_b == pytest.approx(-q[rows, following])
    assert np.array_equal(found.agrees, p.argmax(axis=1) == q.argmax(axis=1))
    report = found.as_dict()
    assert report["perplexity_ratio"] == pytest.approx(
        report["perplexity_b"] / report["perplexity_a"]
    )
    low, high = report["perplexity_ratio_interval"]
    assert low < report["perplexity_ratio"] < high


def test_shared_experts():
    a = np.array([[[0, 1], [2, 3], [4, -1], [5, 6]]], np.int16)
    b = np.array([[[1, 0], [2, 7], [4, -1], [6, -1]]], np.int16)
    assert shared_experts(a, b).tolist() == [[1.0, 0.5, 1.0, 0.5]]
    assert shared_experts(a, b[..., :1]).tolist() == [[0.5, 0.5, 1.0, 0.5]]


def test_each_row_has_its_own_experts(models, tmp_path):
    """Over windows, chunks of a window, and the few rows of a chunk that are held at once."""
    plan = TextPlan(tuple(np.tile(IDS, 4).tolist()), 200, 70, 8, 0)
    windows = cut(len(plan.ids), plan.size, plan.stride)
    with Engine(models[0], prefill_chunk=90, threads=2) as engine:
        got = np.concatenate([rows.experts for rows in live(engine).rows(plan)], axis=1)
        with engine.record(tmp_path / "trace"):
            for begin, end, _ in windows:
                engine.logits(plan.ids[begin : end - 1])
    layers = [[], []]
    for event in read_trace(tmp_path / "trace").events:
        if isinstance(event, Routed):
            layers[event.layer].append(event.routing.experts)
    routed = np.stack([np.concatenate(layer) for layer in layers])  # of whole windows
    expected, at = [], 0
    for begin, end, first in windows:
        expected.append(routed[:, at + first - 1 - begin : at + end - 1 - begin])
        at += end - 1 - begin
    assert np.array_equal(got, np.concatenate(expected, axis=1))


def test_routing_is_compared_only_between_like_models(models, tmp_path):
    fewer = tiny.hf_checkpoint(tmp_path / "fewer", experts=4, tokenizer=True)
    with Engine(models[0]) as a, Engine(fewer) as b:
        assert "routing_agreement" not in compare(live(a), live(b), PLAN)


def test_where_continuations_part():
    assert compare_generations([1, 2, 3, 4], [1, 2, 9, 4]) == {
        "generated": 4, "first_difference": 2, "agreement": 0.75,
    }  # fmt: skip
    assert compare_generations([1, 2], [1, 2])["first_difference"] is None


def test_a_choice_is_scored_as_a_continuation(models):
    with Engine(models[0], quantize="none", threads=2) as engine:
        prompt, whole = (engine.tokenizer.encode(text) for text in ("the rain", "the rain in an"))
        log_probs = log_softmax(engine.logits(whole))
        score = sum(log_probs[at - 1, whole[at]] for at in range(len(prompt), len(whole)))
        assert choice_score(engine, "the rain", "in an") == pytest.approx(score, abs=1e-4)
        assert choice_score(engine, "the rain ", "in an") == pytest.approx(score, abs=1e-4)
        found = answer_task(engine, TASKS[1])
        scores = np.array([choice_score(engine, "and", text) for text in TASKS[1].choices])
    assert found.plain == scores.argmax()
    assert found.normalized == (scores / [8, 2, 2]).argmax()


# --- saved sides ---


def saved(models, file, plan=PLAN):
    with Engine(models[0], threads=2) as engine:
        save(live(engine), plan, file)
    return file


def test_a_saved_side_stands_for_the_model(models, tmp_path):
    plan = PLAN._replace(tasks=TASKS)
    file = saved(models, tmp_path / "a.logits", plan)
    assert is_saved(file) and not is_saved(models[0]) and not is_saved(tmp_path)
    side = SavedSide(file)
    assert side.plan == PLAN
    with Engine(models[0], threads=2) as a, Engine(models[1], threads=2) as b:
        itself = compare(live(a), side, plan)
        expected = compare(live(a), live(b), plan)
    assert itself["kl_max"] < 1e-6 and itself["perplexity_ratio"] == 1.0
    assert itself["top_1_agreement"] == itself["routing_agreement"] == 1.0
    assert itself["drift"]["agreement"] == 1.0
    with Engine(models[1], threads=2) as b:
        got = compare(side, live(b), plan)
    assert got["kl_mean"] == pytest.approx(expected["kl_mean"], rel=1e-4)
    for name in ("perplexity_a", "perplexity_b", "routing_agreement_by_layer", "drift", "tasks"):
        assert got[name] == expected[name]
    assert compare(side, SavedSide(file), plan)["kl_max"] == 0.0
    size = len(IDS) * 320 * 4  # float32 logits
    assert file.stat().st_size < 0.7 * size


def test_damage_is_found_wherever_it_is(models, tmp_path):
    file = saved(models, tmp_path / "a.logits")
    data = file.read_bytes()
    for position in np.random.default_rng(4).integers(len(data), size=60).tolist():
        changed = bytearray(data)
        changed[position] ^= 0x55
        file.write_bytes(changed)
        with pytest.raises(ValueError, match=r"a\.logits"):
            side = SavedSide(file)
            list(side.rows(side.plan))
    for end in (0, 10, 100, len(data) // 2, len(data) - 1):
        file.write_bytes(data[:end])
        with pytest.raises(ValueError, match=r"a\.logits"):
            side = SavedSide(file)
            list(side.rows(side.plan))


def test_nothing_half_written_has_the_name(models, tmp_path, monkeypatch):
    def failing(engine, task):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tiered.quality.side.answer_task", failing)
    with pytest.raises(OSError, match="No space"):
        saved(models, tmp_path / "a.logits", PLAN._replace(tasks=TASKS))
    assert list(tmp_path.iterdir()) == []


# --- refusals ---


def test_other_tokenizers_are_refused(models, tmp_path, tiered, text):
    wider = tiny.hf_checkpoint(tmp_path / "wider", vocab=330, tokenizer=True)
    status, _, err = tiered("compare", models[0], wider, "--text", text)
    assert status == 1 and "tokens" in err and len(err.strip().splitlines()) == 1
    other = tiny.hf_checkpoint(tmp_path / "other", tokenizer=True)
    file = other / "tokenizer.json"
    file.write_text(file.read_text().replace('"<x1>"', '"<y1>"'))
    status, _, err = tiered("compare", models[0], other, "--text", text)
    assert status == 1 and "tokenizers" in err and len(err.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: no "),
        ('{"question": "a", "choices": ["b"], "answer": 0}', "at least two"),
        ('{"question": "a", "choices": ["b", ""], "answer": 0}', "not empty"),
        ('{"question": "a", "choices": ["b", "c"], "answer": 2}', "position"),
        ('{"question": "a", "choices": ["b", "c"], "answer": true}', "position"),
        ('{"question": "a", "choices": "bc", "answer": 0}', "texts"),
        ("[]", "line 2: no "),
    ],
)
def test_tasks_are_checked(tmp_path, line, message):
    file = tmp_path / "tasks.jsonl"
    good = '{"question": "a", "choices": ["b", "c"], "answer": 1}\n'
    file.write_text(good + line + "\n")
    with pytest.raises(ValueError, match=message):
        read_tasks(file)
    file.write_text(good + "\n" + good)
    assert read_tasks(file) == [Task("a", ("b", "c"), 1)] * 2
    file.write_text("\n")
    with pytest.raises(ValueError, match="empty"):
        read_tasks(file)


def test_rows_that_do_not_fit_are_refused(models):
    with (
        Engine(models[0], threads=2) as a,
        Engine(models[0], prefill_chunk=7, threads=2) as b,
        pytest.raises(ValueError, match="other rows"),
    ):
        compare_text(live(a), live(b), PLAN)


# --- the command ---


def test_settings_of_one_model(models, tiered, text, tmp_path):
    tasks = tmp_path / "tasks.jsonl"
    tasks.write_text("".join(json.dumps(task._asdict()) + "\n" for task in TASKS))
    arguments = ("--text", text, "--window", 64, "--generate", 8, "--threads", 2, "--tasks", tasks)
    status, out, err = tiered(
        "compare", models[0], "--a", "quantize=none", "--b", "kv-dtype=int8", *arguments,
        "--json", tmp_path / "out.json",
    )  # fmt: skip
    assert status == 0, err
    for word in (
        "quantize=none", "kv_dtype=int8", "KL divergence, mean", "ratio B / A", "greedy",
        "same likeliest token", "shared experts by layer", "accuracy",
    ):  # fmt: skip
        assert word in out
    report = json.loads((tmp_path / "out.json").read_text())
    assert report["kl_mean"] > 0 and report["a"]["settings"] == {"quantize": "none"}
    status, out, _ = tiered("compare", models[0], *arguments, "--json")
    assert status == 0 and json.loads(out)["kl_max"] == 0


def test_save_then_compare(models, tiered, text, tmp_path):
    file = tmp_path / "a.logits"
    status, _, err = tiered("compare", models[0], "--text", text, "--save", file, "--generate", 4,
                            "--window", 64, "--threads", 2)  # fmt: skip
    assert status == 0 and "wrote" in err
    status, out, err = tiered("compare", file, models[1], "--json", "--threads", 2)
    assert status == 0, err
    assert json.loads(out)["drift"]["generated"] == 4 and json.loads(out)["window"] == 64
    _, _, err = tiered("compare", models[0], "--text", text, "--save", tmp_path / "b.logits",
                       "--quantize", "none", "--window", 64, "--generate", 4)  # fmt: skip
    status, out, _ = tiered("compare", file, tmp_path / "b.logits")
    assert status == 0 and "quantize=none" in out
    for more, message in [
        (["--stride", 5], "--stride"),
        (["--max-tokens", 9, "--text", text], "--text"),
        (["--generate", 5], "--generate"),
        (["--a", "quantize=none"], "settings"),
        (["--max-tokens", 9], "goes with a --text"),
    ]:
        status, _, err = tiered("compare", file, models[1], *more)
        assert status == 2 and message in err, more


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--text"),
        (["--text", "TEXT", "--a", "quantise=none"], "the keys are: "),
        (["--text", "TEXT", "--a", "quantize"], "KEY=VALUE"),
        (["--text", "TEXT", "--b", "quantize=int3"], "int3"),
        (["--text", "TEXT", "--b", "look-ahead=9"], "look"),
        (["--text", "TEXT", "--save", "x", "--b", "quantize=none"], "leave B out"),
        (["--text", "TEXT", "--tasks", "/no/such/file"], "/no/such/file"),
    ],
    ids=str,
)
def test_mistakes_get_one_line(models, tiered, text, arguments, message):
    arguments = [text if argument == "TEXT" else argument for argument in arguments]
    status, _, err = tiered("compare", models[0], *arguments)
    assert status != 0 and message in err and "Traceback" not in err


def test_divergence_is_never_below_nothing(models):
    with Engine(models[0], threads=2) as engine:
        rows = next(iter(live(engine).rows(PLAN)))
    shifted = rows._replace(logits=rows.logits + np.float32(3.0))
    assert (comparing.divergence(rows, shifted) >= 0).all()
    assert comparing.divergence(rows, shifted).max() < 1e-9
