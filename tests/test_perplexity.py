"""Perplexity: each token counted once, the same as transformers' own, whatever is in memory."""

import json
import math

import numpy as np
import pytest
import tiny

from tiered import Engine
from tiered.quality.interval import interval
from tiered.quality.likelihood import token_log_probs
from tiered.quality.perplexity import measure_perplexity
from tiered.quality.text import read_text, text_tokens
from tiered.quality.windows import cut
from tiered.text.sampling import log_softmax

IDS = np.random.default_rng(0).integers(3, 300, 150).tolist()
EXACT = dict(quantize="none", kv_dtype="f32", threads=2)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    return tiny.hf_checkpoint(folder / "hf", "mixtral", "f32", tokenizer=True)


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("the rain in the north, and then the heat: é ≤ 漢字. " * 6, encoding="utf-8")
    return file


@pytest.mark.parametrize("num_tokens", [2, 3, 31, 32, 33, 64, 65, 100])
@pytest.mark.parametrize(("size", "stride"), [(32, 32), (32, 16), (32, 1), (32, 31), (200, 100)])
def test_each_token_is_predicted_once(num_tokens, size, stride):
    windows = cut(num_tokens, size, stride)
    predicted = [token for w in windows for token in range(w.first, w.end)]
    # The first of a window has nothing before it, but with a stride below the size it was counted.
    left_out = range(size, num_tokens, size) if stride == size else ()
    expected = [token for token in range(1, num_tokens) if token not in left_out]
    assert predicted == expected
    for w in windows:
        assert w.begin < w.first and w.end - w.begin <= size
        assert w.begin == 0 or w.first - w.begin >= min(size - stride, num_tokens) or stride == size


@pytest.mark.parametrize("stride", [0, 33])
def test_a_stride_lies_within_the_window(stride):
    with pytest.raises(ValueError, match="stride"):
        cut(100, 32, stride)


def naive_losses(logits_of, ids, size, stride):
    """Every window's logits at once, and the loss of each token that was not counted before."""
    losses, counted = {}, {0}
    for begin in range(0, len(ids), stride):
        part = ids[begin : begin + size]
        log_probs = log_softmax(logits_of(part))
        for position in range(1, len(part)):
            if begin + position not in counted:
                losses[begin + position] = -log_probs[position - 1, part[position]]
        counted |= set(range(begin, begin + len(part)))
        if begin + size >= len(ids):
            break
    return [losses[position] for position in sorted(losses)]


@pytest.mark.parametrize(("size", "stride"), [(40, 40), (40, 13), (64, 32), (256, 8)])
def test_losses_are_those_of_plain_windows(model, size, stride):
    with Engine(model, prefill_chunk=24, **EXACT) as engine:
        found = measure_perplexity(engine, IDS, size, stride)
        expected = naive_losses(engine.logits, IDS, min(size, len(IDS)), stride)
    assert found.losses == pytest.approx(expected, abs=1e-5)
    assert found.value == pytest.approx(math.exp(np.mean(expected)))


def test_logits_from_a_position_on_are_the_last_of_all(model):
    with Engine(model, prefill_chunk=70, **EXACT) as engine:
        whole = engine.logits(IDS)
        for start in (0, 1, 63, 64, 65, 69, 70, 71, 149):
            got = list(engine.logits_by_rows(IDS, start))
            assert np.concatenate(got) == pytest.approx(whole[start:], abs=1e-4)
            assert max(map(len, got)) <= 64  # a budget for memory does not hold more


def test_a_budget_does_not_change_it(model):
    with Engine(model, **EXACT) as engine:
        expected = measure_perplexity(engine, IDS, 48)
        half = str(engine.plan.experts // 2)
    with Engine(model, expert_ram=half, **EXACT) as engine:
        got = measure_perplexity(engine, IDS, 48)
        assert engine.stats.misses > 0
    assert np.array_equal(got.losses, expected.losses)


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe", "olmoe", "qwen2_moe", "llama"])
@pytest.mark.parametrize(("size", "stride"), [(150, 75), (48, 48), (48, 20)])
def test_it_is_what_transformers_says(tmp_path, model_type, size, stride):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    folder = tiny.hf_checkpoint(tmp_path / "hf", model_type, "f32")
    reference = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    losses = []
    for window in cut(len(IDS), size, stride):
        ids = torch.tensor([IDS[window.begin : window.end]])
        labels = ids.clone()
        labels[:, : window.first - window.begin] = -100
        with torch.no_grad():
            losses += [reference(ids, labels=labels).loss.item()] * window.num_predicted
    with Engine(folder, quantize="none", threads=2) as engine:
        got = measure_perplexity(engine, IDS, size, stride)
    assert len(got.losses) == len(losses)
    assert got.value == pytest.approx(math.exp(np.mean(losses)), rel=1e-3)


def test_token_log_probs_are_those_of_whole_rows():
    logits = np.random.default_rng(1).standard_normal((150, 33)).astype(np.float32) * 9
    tokens = np.arange(150) % 33
    expected = log_softmax(logits)[np.arange(150), tokens]
    assert np.array_equal(token_log_probs(logits, tokens), expected)
    assert len(token_log_probs(logits[:0], [])) == 0


def test_an_interval_holds_the_mean_and_shrinks_with_more_values():
    random = np.random.default_rng(2)
    widths = []
    for count in (400, 40_000):
        values = random.standard_normal(count)
        low, high = interval(values)
        assert low < values.mean() < high
        assert high - low == pytest.approx(2 * 1.96 / math.sqrt(count), rel=0.25)
        widths.append(high - low)
    assert widths[1] < widths[0] / 5
    assert interval(np.ones(100)) == (1.0, 1.0)
    assert interval(np.array([3.0])) == (3.0, 3.0)


def test_neighbours_that_say_the_same_widen_the_interval():
    values = np.random.default_rng(3).standard_normal(2000)
    once, repeated = interval(values), interval(np.repeat(values[:200], 10))
    assert repeated.high - repeated.low > 2 * (once.high - once.low)


def test_any_utf8_text(tmp_path, model, text):
    with Engine(model, **EXACT) as engine:
        ids = text_tokens(engine.tokenizer, text)
        assert engine.tokenizer.decode(ids) == read_text(text)
        assert text_tokens(engine.tokenizer, text, 7) == ids[:7]
        file = tmp_path / "control.txt"
        file.write_text("the<|end|>the")
        assert not engine.tokenizer.special_ids & set(text_tokens(engine.tokenizer, file))


def test_the_command(tiered, tmp_path, model, text):
    arguments = ("ppl", model, "--text", text, "--window", 64, "--threads", 2)
    status, out, err = tiered(*arguments, "--json", tmp_path / "a.json")
    assert status == 0, err
    for word in ("perplexity", "95 %", "tokens", "windows of 64 tokens, stride 32"):
        assert word in out
    report = json.loads((tmp_path / "a.json").read_text())
    assert report["perplexity"] == pytest.approx(math.exp(report["mean_nll"]))
    low, high = report["perplexity_interval"]
    assert low < report["perplexity"] < high and report["seconds"] > 0
    assert report["predicted"] == report["tokens"] - 1
    status, out, _ = tiered(*arguments, "--max-tokens", 40, "--json")
    assert status == 0 and json.loads(out)["tokens"] == 40


@pytest.mark.parametrize(
    ("content", "arguments", "message"),
    [
        (b"\xff\xfe caf\xe9", [], "no UTF-8 text"),
        (b" \n", [], "is empty"),
        (b"x", [], "at least 2"),
        (None, [], "No such file"),
        (b"the and the", ["--window", 1000, "--context", 64], "smaller --window"),
        (b"the and the", ["--window", 1], "--window"),
        (b"the and the", ["--stride", 0], "--stride"),
    ],
)  # fmt: skip
def test_mistakes_get_one_line(tiered, tmp_path, model, content, arguments, message):
    file = tmp_path / "text.txt"
    if content is not None:
        file.write_bytes(content)
    status, _, err = tiered("ppl", model, "--text", file, *arguments)
    assert status != 0 and message in err and "Traceback" not in err
