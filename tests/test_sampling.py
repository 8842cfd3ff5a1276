import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tiered.text.sampling import (
    Sampler,
    SamplingParams,
    candidates,
    log_softmax,
    penalize,
    pick,
)


def naive_distribution(logits, params):
    """Probability of every token, by full sorts, one step after the other."""
    x = logits.astype(np.float64) / params.temperature
    kept = np.ones(len(x), bool)
    if params.top_k:
        kept &= x >= np.sort(x)[::-1][min(params.top_k, len(x)) - 1]
    p = np.where(kept, np.exp(x - x.max()), 0)
    p /= p.sum()
    order = np.argsort(-p, kind="stable")
    before = np.cumsum(p[order]) - p[order]
    if params.top_p < 1:
        kept[order[before >= params.top_p]] = False
    kept &= p >= params.min_p * p.max()
    p = np.where(kept, p, 0)
    return p / p.sum()


def distribution(logits, params):
    tokens, weights = candidates(logits, params)
    p = np.zeros(len(logits))
    p[... if tokens is None else tokens] = weights / weights.sum(dtype=np.float64)
    return p


@given(
    seed=st.integers(0, 2**32),
    size=st.sampled_from([1, 2, 7, 300, 3000]),
    temperature=st.sampled_from([0.3, 1.0, 4.0]),
    top_k=st.sampled_from([0, 1, 3, 50, 10_000]),
    top_p=st.sampled_from([1e-6, 0.5, 0.93, 1.0]),
    min_p=st.sampled_from([0.0, 0.07, 1.0]),
)
@settings(max_examples=200)
def test_the_distribution_is_the_naive_one(seed, size, temperature, top_k, top_p, min_p):
    params = SamplingParams(temperature, top_k, top_p, min_p)
    logits = np.random.default_rng(seed).normal(0, 3, size).astype(np.float32)
    expected = naive_distribution(logits, params)
    # float32: scaled logits are right to 2**-24 of them, and so are their exponentials.
    np.testing.assert_allclose(distribution(logits, params), expected, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("size", [1, 5, 1000, 60_000])
def test_the_likeliest_come_first_and_equals_in_their_order(size):
    rng = np.random.default_rng(size)
    logits = rng.integers(-40, 40, size).astype(np.float32) / 7
    logits[rng.random(size) < 0.1] = 0.0
    logits[rng.random(size) < 0.1] = -0.0
    logits[rng.random(size) < 0.1] = -np.inf
    logits[0] = 3.0
    order = np.argsort(-logits, kind="stable")
    tokens, weights = candidates(logits, SamplingParams(1.0, top_k=size - 1, top_p=1 - 1e-9))
    likely = order[np.exp(logits[order] - logits.max()) > 1e-6]
    np.testing.assert_array_equal(tokens[: len(likely)], likely[: len(tokens)])
    assert (np.diff(weights) <= 0).all()


def test_draws_follow_the_distribution():
    params = SamplingParams(temperature=0.8, top_k=6, top_p=0.95, seed=3)
    logits = np.random.default_rng(0).normal(0, 1.5, 40).astype(np.float32)
    sampler = Sampler(params)
    counts = np.bincount([sampler.sample(logits) for _ in range(20_000)], minlength=40)
    p = naive_distribution(logits, params)
    assert (counts[p == 0] == 0).all()
    error = np.abs(counts / 20_000 - p) / np.sqrt(np.maximum(p * (1 - p), 1e-9) / 20_000)
    assert error.max() < 4.5  # standard deviations


def test_greedy_takes_the_first_of_equals_and_changes_nothing():
    logits = np.array([0, 3, 3, 1], np.float32)
    before = logits.copy()
    assert Sampler(SamplingParams()).sample(logits) == 1
    assert Sampler(SamplingParams(repetition_penalty=2.0), [1]).sample(logits) == 2
    Sampler(SamplingParams(temperature=1.0, repetition_penalty=1.3), [0, 1]).sample(logits)
    np.testing.assert_array_equal(logits, before)


def test_a_seed_repeats_and_none_does_not():
    logits = np.zeros(1000, np.float32)

    def draw(seed):
        sampler = Sampler(SamplingParams(temperature=1.0, seed=seed))
        return [sampler.sample(logits) for _ in range(20)]

    assert draw(5) == draw(5) != draw(6)
    assert draw(None) != draw(None)


@pytest.mark.parametrize("count", [1, 255, 256, 257, 1000, 1024])
def test_pick_is_a_search_in_the_running_sum(count):
    rng = np.random.default_rng(count)
    weights = rng.random(count).astype(np.float32) ** 8
    weights[rng.random(count) < 0.5] = 0
    weights[rng.integers(count)] = 1
    running = np.cumsum(weights.astype(np.float64))
    for part in rng.random(200):
        assert pick(weights, part) == np.searchsorted(running, part * running[-1], side="right")
    for part in (0.0, np.nextafter(1.0, 0.0)):  # not a token that is ruled out
        assert weights[pick(weights, part)] > 0


def test_repetition_penalty():
    logits = np.array([2.0, -2.0, 1.0], np.float32)
    np.testing.assert_array_equal(penalize(logits, [0, 1], 2.0), [1.0, -4.0, 1.0])
    sampler = Sampler(SamplingParams(repetition_penalty=4.0))
    assert [sampler.sample(logits) for _ in range(3)] == [0, 2, 0]  # its own tokens count


def test_tiny_temperatures_are_greedy():
    logits = np.array([1, 5, 4.999], np.float32)
    assert Sampler(SamplingParams(temperature=1e-300, seed=0)).sample(logits) == 1


def test_log_softmax():
    logits = np.random.default_rng(0).normal(0, 5, (3, 50)).astype(np.float32)
    np.testing.assert_allclose(np.exp(log_softmax(logits)).sum(axis=-1), 1)
    np.testing.assert_allclose(np.diff(log_softmax(logits)), np.diff(logits.astype(float)))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_numbers(bad, temperature):
    logits = np.array([0, bad, 1], np.float32)
    with pytest.raises(ValueError, match="not a number"):
        Sampler(SamplingParams(temperature)).sample(logits)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1), ("temperature", float("nan")), ("temperature", float("inf")),
        ("top_k", -1), ("top_k", 1.5), ("top_p", 0.0), ("top_p", 1.1), ("min_p", -0.1),
        ("min_p", 2.0), ("repetition_penalty", 0.0), ("repetition_penalty", float("inf")),
        ("seed", -1),
    ],
)  # fmt: skip
def test_bad_choices_name_themselves(name, value):
    with pytest.raises(ValueError, match=f"^{name} must be"):
        SamplingParams(**{name: value})
