from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from naive_attention import NaiveAttention

from cpu_kernels.attention import Attention, kv_pages
from cpu_kernels.chain import Chain
from cpu_kernels.isa import choose
from cpu_kernels.kv import KVPages
from cpu_kernels.linear import Matrix
from cpu_kernels.team import Team
from tiered.backend import Batch
from tiered.config import ModelConfig, RopeConfig


@pytest.fixture(scope="module")
def chains():
    with Team(1) as one, Team(2) as two, Team(3) as three:
        yield {1: Chain(one), 2: Chain(two), 3: Chain(three)}


def config(num_heads=4, num_kv_heads=2, head_dim=16, hidden_size=32, **other):
    return ModelConfig(
        model_type="test",
        num_layers=2,
        hidden_size=hidden_size,
        vocab_size=1,
        context_length=512,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        norm_eps=1e-5,
        **other,
    )


def random_weights(c, seed=0, scale=1.0):
    """By name, float64 that float32 holds exactly."""
    random = np.random.default_rng(seed)
    q_size, kv_size = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim

    def matrix(rows, columns, scale=1.0):
        values = random.standard_normal((rows, columns)) * scale / np.sqrt(columns)
        return values.astype(np.float32).astype(np.float64)

    weights = {
        "norm": random.random(c.hidden_size).astype(np.float32).astype(np.float64) + 0.5,
        "q": matrix(q_size, c.hidden_size, scale),
        "k": matrix(kv_size, c.hidden_size, scale),
        "v": matrix(kv_size, c.hidden_size),
        "o": matrix(c.hidden_size, q_size),
    }
    if c.qk_norm:
        full = c.qk_norm == "full"
        weights["q_norm"] = random.random(q_size if full else c.head_dim) + 0.5
        weights["k_norm"] = random.random(kv_size if full else c.head_dim) + 0.5
    return weights


def selecting_weights(c, seed=0):
    """Matrices with a single one in each row: their products have the same bits however they are
    summed, so that differences can only come from attention itself."""
    random, weights = np.random.default_rng(seed), random_weights(c, seed)
    for name in ("q", "k", "v", "o"):
        num_rows, num_columns = weights[name].shape
        weights[name] = np.eye(num_columns)[random.integers(0, num_columns, num_rows)]
    return weights


def prepared(weights):
    """The same for Attention.layer."""
    out = {"q_norm": None, "k_norm": None, "sinks": None, "gate": None, "out_norm": None}
    for name, value in weights.items():
        value = value.astype(np.float32)
        if value.ndim == 2:
            data, bias = value.reshape(-1).view(np.uint8), weights.get(name + "_bias")
            value = Matrix(data, "f32", value.shape, choose(), bias)
        out[name] = value
    return SimpleNamespace(**out)


class Runner:
    """A layer with its KV cache; pages of all sequences are shuffled."""

    def __init__(self, chain, c, weights, dtype="f32", page_size=32, max_tokens=600, sequences=1):
        self.attention = Attention(chain)
        self.layer = self.attention.layer(prepared(weights), c, 0)
        max_pages = -(-max_tokens // page_size)
        pages = np.random.default_rng(1).permutation(max_pages * sequences)
        self.tables = pages.astype(np.int32).reshape(sequences, max_pages)
        self.kv = kv_pages(c, max_pages * sequences, page_size, dtype)

    def __call__(self, x, positions, sequences=None):
        positions = np.asarray(positions, np.int32)
        sequences = np.zeros_like(positions) if sequences is None else sequences
        batch = Batch(positions, positions, np.asarray(sequences, np.int32), self.tables)
        x = np.array(x, np.float32)
        self.attention.run(x, self.layer, self.kv, 1, batch)
        return x


def rows(num_rows, hidden_size, seed=5):
    return np.random.default_rng(seed).standard_normal((num_rows, hidden_size)).astype(np.float32)


def check(got, x, reference, tolerance=2e-5):
    """What attention adds, relative to the largest of it."""
    np.testing.assert_allclose(
        got - x, reference - x, rtol=0, atol=tolerance * np.abs(reference - x).max() + 1e-6
    )


@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "head_dim"),
    [(1, 1, 16), (4, 4, 64), (4, 2, 80), (8, 1, 128), (6, 2, 24), (3, 1, 2), (32, 1, 16)],
)
@pytest.mark.parametrize("num_rows", [1, 5, 40])
def test_shapes(chains, num_heads, num_kv_heads, head_dim, num_rows):
    c = config(num_heads, num_kv_heads, head_dim)
    weights, x = random_weights(c), rows(num_rows, c.hidden_size)
    reference = NaiveAttention(weights, c)(x.astype(float), np.arange(num_rows), np.zeros(num_rows))
    check(Runner(chains[2], c, weights)(x, np.arange(num_rows)), x, reference)


@pytest.mark.parametrize("page_size", [16, 64, 256])
def test_lengths_around_the_borders_of_pages_and_chunks(chains, page_size):
    c = config()
    weights, x = random_weights(c), rows(530, c.hidden_size)
    run = Runner(chains[2], c, weights, page_size=page_size)
    naive = NaiveAttention(weights, c)
    start = 0
    for end in (1, 15, 16, 17, 63, 64, 65, 255, 256, 257, 511, 512, 513, 530):
        positions = np.arange(start, end)
        part = x[start:end]
        reference = naive(part.astype(float), positions, np.zeros(end - start))
        check(run(part, positions), part, reference)
        start = end


@pytest.mark.parametrize(
    "other",
    [
        {"qk_norm": "head"},
        {"qk_norm": "full", "clip_qkv": 0.7},
        {"clip_qkv": 0.5},
        {"rope": RopeConfig(pairs="adjacent", theta=500.0)},
        {"rope": RopeConfig(dim=8, magnitude=1.3, inv_freq_scale=(1.0, 2.0, 4.0, 4.0))},
        {"sliding_window": 1},
        {"sliding_window": 20},
        {"sliding_window": 300},
        {"sliding_window": 20, "chunked_attention": True},
        {"sliding_window": 300, "chunked_attention": True},
        {
            "sliding_window": 20,
            "full_layers": frozenset({0}),
            "full_layers_rotate": False,
            "temperature": 0.7,
            "temperature_step": 90,
        },
    ],
)
def test_variants(chains, other):
    c = config(**other)
    weights, x = random_weights(c), rows(600, c.hidden_size)
    naive, run = NaiveAttention(weights, c), Runner(chains[2], c, weights)
    for start, end in ((0, 290), (290, 291), (291, 300), (300, 598), (598, 600)):
        positions, part = np.arange(start, end), x[start:end]
        reference = naive(part.astype(float), positions, np.zeros(end - start))
        check(run(part, positions), part, reference)


def test_sinks_and_biases(chains):
    c = config()
    weights, x = random_weights(c), rows(50, c.hidden_size)
    random = np.random.default_rng(2)
    weights["sinks"] = np.array([-3.0, 0.0, 2.0, 60.0])
    for name in ("q", "k", "v"):
        bias = random.standard_normal(len(weights[name]))
        weights[name + "_bias"] = bias.astype(np.float32).astype(np.float64)
    naive, run = NaiveAttention(weights, c), Runner(chains[2], c, weights)
    for start, end in ((0, 49), (49, 50)):
        positions, part = np.arange(start, end), x[start:end]
        reference = naive(part.astype(float), positions, np.zeros(end - start))
        check(run(part, positions), part, reference)


@pytest.mark.parametrize(("dtype", "tolerance"), [("f16", 1e-3), ("int8", 2e-2)])
def test_smaller_kv_caches(chains, dtype, tolerance):
    # float16 keeps 11 bits, int8 rounds to 1/254 of a head's largest value, about 1 % of a typical
    # one; scores of size 1 turn both into errors of about that size, averaged over positions.
    c = config(8, 2, 64, 64)
    weights, x = random_weights(c), rows(300, c.hidden_size)
    reference = NaiveAttention(weights, c)(x.astype(float), np.arange(300), np.zeros(300))
    check(Runner(chains[2], c, weights, dtype)(x, np.arange(300)), x, reference, tolerance)


@pytest.mark.parametrize("dtype", ["f32", "f16", "int8"])
@pytest.mark.parametrize("window", [0, 100])
def test_bits_do_not_depend_on_threads_splits_or_company(chains, dtype, window):
    c = config(8, 2, 80, 64, sliding_window=window, qk_norm="head")
    weights, length = selecting_weights(c), 530
    x, other = rows(length, c.hidden_size), rows(length, c.hidden_size, seed=6)
    run = Runner(chains[1], c, weights, dtype)
    whole = run(x, np.arange(length))
    for num_threads in (2, 3):
        again = Runner(chains[num_threads], c, weights, dtype)(x, np.arange(length))
        assert (again == whole).all()
    # In pieces of every size, from single tokens to more than a chunk.
    run, start, pieces = Runner(chains[2], c, weights, dtype), 0, (1, 2, 7, 13, 20, 63, 64, 65, 270)
    for piece in (*pieces, length - sum(pieces)):
        part = slice(start, start + piece)
        assert (run(x[part], np.arange(start, start + piece)) == whole[part]).all()
        start += piece
    # Together with another sequence, which is ahead.
    run = Runner(chains[2], c, weights, dtype, sequences=2)
    run(other[:500], np.arange(500), np.ones(500))
    for start, end in ((0, 3), (3, 4), (4, 20)):
        both = np.concatenate([other[500 + start : 500 + end], x[start:end]])
        positions = [*range(500 + start, 500 + end), *range(start, end)]
        got = run(both, positions, np.repeat([1, 0], end - start))
        assert (got[end - start :] == whole[start:end]).all()


def test_layers_keep_their_own_keys(chains):
    c = config()
    weights, x = selecting_weights(c), rows(10, c.hidden_size)
    run = Runner(chains[1], c, weights)
    first = run(x, np.arange(10))
    batch = Batch(*[np.zeros(1, np.int32)] * 3, run.tables)
    run.attention.run(rows(1, c.hidden_size, seed=9), run.layer, run.kv, 0, batch)
    assert (run(x[9:], [9]) == first[9:]).all()


@pytest.mark.parametrize("dtype", ["f32", "f16", "int8"])
@pytest.mark.parametrize("size", [1e-30, 1e3, 1e8, 1e18])
def test_extreme_values_stay_finite(chains, dtype, size):
    c = config()
    weights = random_weights(c, scale=size)
    x = rows(40, c.hidden_size)
    run = Runner(chains[2], c, weights, dtype)
    assert np.isfinite(run(x, np.arange(40))).all()
    assert np.isfinite(run(x[:1], [40])).all()


def test_what_earlier_texts_left_in_a_page_does_not_matter(chains):
    c = config()
    weights, x = random_weights(c), rows(30, c.hidden_size)
    clean = Runner(chains[1], c, weights, "f16")
    dirty = Runner(chains[1], c, weights, "f16")
    for arrays in dirty.kv.arrays.values():
        arrays["keys"].fill(np.nan)
        arrays["values"].fill(np.nan)
    for start, end in ((0, 1), (1, 30)):
        part, positions = x[start:end], np.arange(start, end)
        assert (clean(part, positions) == dirty(part, positions)).all()


@settings(deadline=None, max_examples=30)
@given(
    num_kv_heads=st.integers(1, 3),
    group=st.integers(1, 5),
    half_dim=st.integers(1, 20),
    hidden_size=st.integers(1, 40),
    lengths=st.lists(st.integers(1, 70), min_size=1, max_size=4),
    window=st.sampled_from([0, 3, 33]),
    num_threads=st.sampled_from([1, 2, 3]),
)
def test_any_shape(
    chains, num_kv_heads, group, half_dim, hidden_size, lengths, window, num_threads
):
    c = config(group * num_kv_heads, num_kv_heads, 2 * half_dim, hidden_size, sliding_window=window)
    weights, x = random_weights(c), rows(sum(lengths), hidden_size)
    run = Runner(
        chains[num_threads], c, weights, page_size=16, max_tokens=80, sequences=len(lengths)
    )
    positions = np.concatenate([np.arange(n) for n in lengths])
    sequences = np.repeat(np.arange(len(lengths)), lengths)
    reference = NaiveAttention(weights, c)(x.astype(float), positions, sequences)
    check(run(x, positions, sequences), x, reference, 5e-5)


def test_bad_batches_are_refused(chains):
    c = config()
    run = Runner(chains[1], c, random_weights(c), max_tokens=64)
    x = rows(2, c.hidden_size)
    for positions, sequences, message in (
        ([0, 64], None, "position"),
        ([-1, 0], None, "position"),
        ([0, 1], [0, 1], "sequence"),
    ):
        with pytest.raises(ValueError, match=message):
            run(x, positions, sequences)
    with pytest.raises(ValueError, match="x must be"):
        run(rows(2, 8), [0, 1])
    run.tables = np.array([[0, -1]], np.int32)
    with pytest.raises(ValueError, match="page"):
        run(x, [0, 40])
    assert run(x, [0, 1]).shape == x.shape
    assert run(x[:0], []).shape == (0, c.hidden_size)


def test_impossible_layers_and_caches_are_refused(chains):
    c = config()
    weights = random_weights(c)
    attention = Attention(chains[1])
    with pytest.raises(ValueError, match="shape"):
        attention.layer(prepared(weights), config(num_heads=8), 0)
    with pytest.raises(ValueError, match="norm must have"):
        attention.layer(prepared({**weights, "norm": np.ones(3)}), c, 0)
    with pytest.raises(ValueError, match="f32, f16 or int8"):
        KVPages({0: (1, 16)}, 1, 64, "bf16")
    for page_size in (0, 8, 48, 512):
        with pytest.raises(ValueError, match="page_size"):
            KVPages({0: (1, 16)}, 1, page_size, "f16")
