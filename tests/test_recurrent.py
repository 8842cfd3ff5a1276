"""Layers that remember a text in a state: it goes on, is never cut, and is nobody else's."""

import numpy as np
import pytest
import tiny
from test_scheduler import make_prompts, run_all

from cpu_kernels.backend import CpuBackend
from tiered import Engine
from tiered.backend import Batch, ConvWeights, DeltaWeights, Mamba2Weights
from tiered.config import DeltaConfig, Mamba2Config, ModelConfig
from tiered.kv_cache import kv_bytes, state_bytes
from tiered.serve.request import Request
from tiered.serve.scheduler import Scheduler

PROMPT = np.random.default_rng(0).integers(3, 256, 21).tolist()
EXACT = dict(quantize="none", kv_dtype="f32", threads=2)


@pytest.fixture(scope="module", params=["qwen3_next", "lfm2_moe", "granitemoehybrid"])
def model(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    return tiny.hf_checkpoint(folder, request.param, "f32", tokenizer=True)


def delta_rule(w, d, h):
    """The layer in float64, token by token: what is added to x, for normed rows h."""
    keys, heads, size = d.num_key_heads, d.num_value_heads, d.conv_size
    qkv = h @ w["qkv"].T
    padded = np.concatenate([np.zeros((size - 1, qkv.shape[1])), qkv])
    mixed = sum(padded[j : j + len(h)] * w["conv"][j] for j in range(size))
    mixed = mixed / (1 + np.exp(-mixed))
    q, k, v = np.split(mixed, np.cumsum([keys * d.key_dim] * 2), axis=1)
    q, k = (t.reshape(len(h), keys, d.key_dim) for t in (q, k))
    q, k = (t / np.sqrt((t * t).sum(-1, keepdims=True) + 1e-6) for t in (q, k))
    v, z = v.reshape(len(h), heads, -1), (h @ w["z"].T).reshape(len(h), heads, -1)
    beta = 1 / (1 + np.exp(-(h @ w["b"].T)))
    decay = np.exp(w["decay"] * np.log1p(np.exp(h @ w["a"].T + w["dt_bias"])))
    out = np.zeros_like(v)
    for head in range(heads):
        key = head % keys if d.is_tiled else head // (heads // keys)
        state = np.zeros((d.key_dim, d.value_dim))
        for t in range(len(h)):
            state *= decay[t, head]
            delta = (v[t, head] - k[t, key] @ state) * beta[t, head]
            state += np.outer(k[t, key], delta)
            out[t, head] = q[t, key] @ state / np.sqrt(d.key_dim)
    out = out / np.sqrt((out * out).mean(-1, keepdims=True) + 1e-5) * w["head_norm"]
    return (out * z / (1 + np.exp(-z))).reshape(len(h), -1) @ w["o"].T


@pytest.mark.parametrize("is_tiled", [False, True])
@pytest.mark.parametrize("sizes", [(1, 1, 8, 16, 2), (2, 4, 24, 32, 4), (3, 6, 16, 48, 3)])
def test_the_delta_rule(sizes, is_tiled):
    """Against float64, in pieces, two texts in one batch, and with the same bits on any threads."""
    d = DeltaConfig(*sizes, is_tiled=is_tiled)
    config = ModelConfig("test", 1, 48, 8, 64, 1, 1, 16, 1e-5, delta=d, delta_layers=frozenset({0}))
    rng = np.random.default_rng(1)
    values = d.num_value_heads * d.value_dim
    shapes = dict(qkv=(d.channels, 48), z=(values, 48), b=(d.num_value_heads, 48))
    shapes |= dict(a=(d.num_value_heads, 48), o=(48, values))
    w = {name: rng.standard_normal(shape, np.float32) / 7 for name, shape in shapes.items()}
    w |= dict(conv=rng.standard_normal((d.conv_size, d.channels), np.float32))
    w |= dict(dt_bias=rng.standard_normal(d.num_value_heads, np.float32))
    w |= dict(decay=-rng.uniform(0.1, 8, d.num_value_heads).astype(np.float32))
    w |= dict(head_norm=rng.uniform(0.5, 1.5, d.value_dim).astype(np.float32))
    x = rng.standard_normal((30, 48), np.float32)
    normed = (x / np.sqrt((x.astype(np.float64) ** 2).mean(-1, keepdims=True) + 1e-5)).astype(float)
    expected = [delta_rule(w, d, normed[:20]), delta_rule(w, d, normed[20:])]
    check_layer("delta_layer", DeltaWeights, w, shapes, config, x, expected)


def convolution(w, h):
    """The same for a gated short convolution."""
    b, c, v = np.split(h @ w["gates"].T, 3, axis=1)
    size = len(w["conv"])
    padded = np.concatenate([np.zeros((size - 1, b.shape[1])), b * v])
    mixed = sum(padded[j : j + len(h)] * w["conv"][j] for j in range(size))
    return (c * mixed) @ w["o"].T


@pytest.mark.parametrize("size", [1, 3, 6])
def test_a_short_convolution(size):
    config = ModelConfig(
        "test", 1, 48, 8, 64, 1, 1, 16, 1e-5, conv_layers=frozenset({0}), conv_size=size
    )
    rng = np.random.default_rng(1)
    shapes = dict(gates=(144, 48), o=(48, 48))
    w = {name: rng.standard_normal(shape, np.float32) / 7 for name, shape in shapes.items()}
    w |= dict(conv=rng.standard_normal((size, 48), np.float32))
    x = rng.standard_normal((30, 48), np.float32)
    normed = (x / np.sqrt((x.astype(np.float64) ** 2).mean(-1, keepdims=True) + 1e-5)).astype(float)
    expected = [convolution(w, normed[:20]), convolution(w, normed[20:])]
    check_layer("conv_layer", ConvWeights, w, shapes, config, x, expected)


def state_space(w, m, h):
    """The same for Mamba-2."""
    xbc = h @ w["xbc"].T
    padded = np.concatenate([np.zeros((m.conv_size - 1, m.channels)), xbc])
    mixed = sum(padded[j : j + len(h)] * w["conv"][j] for j in range(m.conv_size))
    mixed = mixed + (0 if w["conv_bias"] is None else w["conv_bias"])
    mixed = mixed / (1 + np.exp(-mixed))
    shared = m.num_groups * m.state_dim
    x, b, c = np.split(mixed, [m.inner_size, m.inner_size + shared], axis=1)
    x = x.reshape(len(h), m.num_heads, m.head_dim)
    b, c = (t.reshape(len(h), m.num_groups, m.state_dim) for t in (b, c))
    step = np.log1p(np.exp(h @ w["dt"].T + w["dt_bias"]))
    out = np.zeros_like(x)
    for head in range(m.num_heads):
        group, state = head // (m.num_heads // m.num_groups), np.zeros((m.state_dim, m.head_dim))
        for t in range(len(h)):
            state *= np.exp(w["decay"][head] * step[t, head])
            state += np.outer(b[t, group], step[t, head] * x[t, head])
            out[t, head] = c[t, group] @ state + w["skip"][head] * x[t, head]
    z = h @ w["z"].T
    gated = (out.reshape(len(h), -1) * z / (1 + np.exp(-z))).reshape(len(h), m.num_groups, -1)
    normed = gated / np.sqrt((gated * gated).mean(-1, keepdims=True) + m.norm_eps)
    return (normed.reshape(len(h), -1) * w["out_norm"]) @ w["o"].T


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("sizes", [(1, 16, 8, 1, 2), (4, 32, 24, 2, 4), (6, 48, 16, 3, 3)])
def test_mamba_2(sizes, has_bias):
    m = Mamba2Config(*sizes, norm_eps=1e-3)
    config = ModelConfig(
        "test", 1, 48, 8, 64, 1, 1, 16, 1e-5, mamba2=m, mamba2_layers=frozenset({0})
    )
    rng = np.random.default_rng(1)
    shapes = dict(z=(m.inner_size, 48), xbc=(m.channels, 48), dt=(m.num_heads, 48))
    shapes |= dict(o=(48, m.inner_size))
    w = {name: rng.standard_normal(shape, np.float32) / 7 for name, shape in shapes.items()}
    w |= dict(conv=rng.standard_normal((m.conv_size, m.channels), np.float32))
    w |= dict(conv_bias=rng.standard_normal(m.channels, np.float32) if has_bias else None)
    w |= dict(dt_bias=rng.standard_normal(m.num_heads, np.float32))
    w |= dict(decay=-rng.uniform(0.05, 4, m.num_heads).astype(np.float32))
    w |= dict(skip=rng.standard_normal(m.num_heads, np.float32))
    w |= dict(out_norm=rng.uniform(0.5, 1.5, m.inner_size).astype(np.float32))
    x = rng.standard_normal((30, 48), np.float32)
    normed = (x / np.sqrt((x.astype(np.float64) ** 2).mean(-1, keepdims=True) + 1e-5)).astype(float)
    expected = [state_space(w, m, normed[:20]), state_space(w, m, normed[20:])]
    check_layer("mamba2_layer", Mamba2Weights, w, shapes, config, x, expected)


def check_layer(make, kind, w, shapes, config, x, expected):
    """A recurrent layer on two texts, rows 0 to 19 and 20 to 29 of x, in two batches of both."""
    results = []
    for threads in (1, 2, 3):
        backend = CpuBackend(threads)
        made = {
            name: backend.matrix(w[name].view(np.uint8).reshape(-1), "f32", shape)
            for name, shape in shapes.items()
        }
        weights = kind(norm=np.ones(48, np.float32), **(w | made))
        layer = getattr(backend, make)(weights, config, 0)
        states = [backend.recurrent_state(config) for _ in range(2)]
        got = x.copy()
        for first, second in ((slice(0, 7), slice(20, 21)), (slice(7, 20), slice(21, 30))):
            rows = np.concatenate([x[second], x[first]])  # the texts' order does not matter
            owners = [1] * (second.stop - second.start) + [0] * (first.stop - first.start)
            positions = [
                *range(second.start - 20, second.stop - 20),
                *range(first.start, first.stop),
            ]
            batch = Batch(
                np.zeros(len(rows), np.int32), np.array(positions, np.int32),
                np.array(owners, np.int32), np.zeros((2, 1), np.int32), states,
            )  # fmt: skip
            backend.attention(rows, layer, None, 0, batch)
            got[second], got[first] = np.split(rows, [second.stop - second.start])
        results.append(got)
        backend.close()
    assert (results[0] == results[1]).all() and (results[0] == results[2]).all()
    want = x + np.concatenate(expected)
    assert np.abs(results[0] - want).max() <= 2e-5 * np.ptp(want)


def test_a_text_goes_on_or_begins_anew(model):
    """What follows is computed alone; what was cut is computed from the beginning."""
    with Engine(model, **EXACT) as engine:
        sequence = engine.open_sequence()
        first = list(engine.generate_tokens(PROMPT, 5, sequence=sequence))
        longer = [*PROMPT, *first[:-1], 9, 8]
        before = engine.stats
        got = list(engine.generate_tokens(longer, 6, sequence=sequence))
        assert (engine.stats - before).prompt_tokens == 2
        assert got == list(engine.generate_tokens(longer, 6))
        before = engine.stats
        again = list(engine.generate_tokens(PROMPT, 5, sequence=sequence))
        assert again == first
        assert (engine.stats - before).prompt_tokens == len(PROMPT)


def test_budgets_and_threads_never_change_the_bits(model):
    with Engine(model, threads=1, look_ahead=0) as engine:
        expected, experts = engine.logits(PROMPT), engine.plan.experts
        assert engine.plan.kv == kv_bytes(engine.config, engine.kv_tokens, "f16")
        assert state_bytes(engine.config) > 0
    for choices in (dict(expert_ram=experts // 3), dict(expert_ram=experts // 2, threads=3)):
        with Engine(model, **choices) as engine:
            assert np.array_equal(engine.logits(PROMPT), expected)


def test_many_at_once_say_what_each_says_alone(model):
    """Requests join and leave, and wait where there is no memory for one more state."""
    with Engine(model, context=128, kv_tokens=256, **EXACT) as engine:
        assert engine.num_texts == 2
        prompts = [tuple(t % 200 + 3 for t in p) for p in make_prompts(6, high=40)]
        alone = [list(engine.generate_tokens(p, 12)) for p in prompts]
        most = 0
        with Scheduler(engine, max_running=4) as scheduler:
            hidden = engine.decoder.hidden

            def watched(*given):
                nonlocal most
                most = max(most, len(scheduler.running))
                return hidden(*given)

            engine.decoder.hidden = watched
            results = run_all(scheduler, [Request(p, max_new_tokens=12) for p in prompts])
        assert [tokens for tokens, _ in results] == alone
        assert most == 2
        assert engine.kv.free_tokens == 256
