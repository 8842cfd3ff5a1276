"""Distillation: students say what their teachers said."""

from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("torch")

import torch
from sources import source
from students import EXACT, IDS, KINDS

from tiered import Engine
from tiered.backend import open_backend
from tiered.config import EngineConfig
from tiered.distilling.beginnings import concatenated, join, merged, pools
from tiered.distilling.pool import Pool, feed_forward, load_pool, load_shared, run_pool
from tiered.distilling.samples import Recorder, Samples, held_out, read_samples, record
from tiered.distilling.stored import layer_tensors, read_pool, write_layer
from tiered.distilling.target import experts_target
from tiered.distilling.training import Recipe, evaluate, split, train
from tiered.formats import open_checkpoint

RECIPE = Recipe(epochs=3, batch=64, learning_rate=1e-3, seed=0)


def listen(model, folder, shared=False):
    """Samples of all layers in `folder`, and scores."""
    folder.mkdir()
    with open_checkpoint(model) as checkpoint:
        config = checkpoint.config
    return record(
        lambda backend: Engine(model, backend=backend, **EXACT),
        open_backend(EngineConfig(**EXACT)), config, IDS, folder, shared, lambda *_: None,
    )  # fmt: skip


def check_close(got, expected):
    """But for the order of sums of some dozen float32."""
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


# --- what the teacher says ---


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("model_type", KINDS)
def test_the_pool_says_what_the_kernels_say(tmp_path, model_type, shared):
    model = source(tmp_path, model_type)
    listen(model, tmp_path / "samples", shared)
    with open_checkpoint(model) as checkpoint:
        for layer in checkpoint.config.sparse_layers:
            samples = read_samples(tmp_path / "samples", layer)
            h = torch.from_numpy(samples.inputs)
            said = run_pool(h, load_pool(checkpoint, layer), checkpoint.config)
            always = load_shared(checkpoint, layer)
            if shared and always is not None:
                gate, up, down, scale = always
                said += feed_forward(h, gate, up, down) * (
                    1 if scale is None else (h @ scale.T).sigmoid()
                )
            expected = samples.outputs
            assert np.abs(said.numpy() - expected).max() <= 1e-5 * np.ptp(expected)
            assert (samples.energy > 0).all()


@pytest.mark.parametrize("shared", [False, True])
def test_listening_changes_nothing(tmp_path, shared):
    """And the energy is that of the hidden state after the layer, shared expert or not."""
    model, states = source(tmp_path, "qwen2_moe"), []
    with open_checkpoint(model) as checkpoint:
        config = checkpoint.config
    plain = open_backend(EngineConfig(**EXACT))
    recorder = Recorder(open_backend(EngineConfig(**EXACT)), config, tmp_path, 200, shared)
    for backend in (plain, recorder):
        with Engine(model, backend=backend, **EXACT) as engine:
            batch = engine.kv.batch([(engine.open_sequence(), IDS[:200])])
            states.append(engine.decoder.hidden(batch, engine.kv.pages).copy())
    assert np.array_equal(*states)
    energy = recorder.rows[1][:, -1]
    if shared:
        assert energy == pytest.approx(np.square(states[0]).sum(axis=1), rel=1e-5)
    else:  # without what the shared expert adds
        assert (energy > 0).all()


def test_an_eighth_is_held_out():
    apart = held_out(1024)
    assert apart.sum() == 128 and not apart[:448].any() and apart[448:512].all()


# --- beginnings ---


def alike(num_experts, config, seed=0):
    """A pool of experts that are all the same."""
    random = torch.Generator().manual_seed(seed)
    one = [torch.randn(1, 32, 16, generator=random), torch.randn(1, 32, 16, generator=random)]
    one.append(torch.randn(1, 16, 32, generator=random))
    router = torch.randn(num_experts, 16, generator=random)
    return Pool(*(part.repeat(num_experts, 1, 1) for part in one), router)


@pytest.fixture
def config(tmp_path):
    with open_checkpoint(source(tmp_path)) as checkpoint:
        return replace(checkpoint.config, num_experts=4, hidden_size=16, expert_size=32)


@pytest.mark.parametrize("size", [32, 40])
def test_experts_that_are_the_same_are_one_feed_forward(config, size):
    teacher, h = alike(4, config), torch.randn(200, 16)
    student = concatenated(teacher, None, h, config, size)
    assert student.gate.shape == (1, size, 16) and student.router is None
    check_close(run_pool(h, student, config), run_pool(h, teacher, config))


def test_a_shared_expert_is_part_of_the_feed_forward(config):
    teacher, h = alike(4, config), torch.randn(200, 16)
    gate, up, down = alike(1, config, seed=1)[:3]
    shared = gate[0], up[0], down[0], None
    student = concatenated(teacher, shared, h, config, 64)
    expected = run_pool(h, teacher, config) + feed_forward(h, gate[0], up[0], down[0])
    check_close(run_pool(h, student, config), expected)


def test_join_keeps_the_neurons_that_add_the_most():
    """Against plain sums, one neuron at a time; neurons 3 and 7 are the same."""
    random = np.random.default_rng(0)
    gate, up, down = random.standard_normal((3, 10, 6)).astype(np.float32)
    for part in (gate, up, down):
        part[7] = part[3]
    h = random.standard_normal((50, 6)).astype(np.float32)
    weights = random.random((50, 10)).astype(np.float32)
    heard = random.random(50).astype(np.float32)
    added, scales = np.zeros(10), np.ones(10)
    for n in range(10):
        z = h @ gate[n]
        active = z / (1 + np.exp(-z)) * (h @ up[n])
        was = active * (weights[:, 3] + weights[:, 7] if n == 3 else weights[:, n])
        will = active * heard
        added[n] = (was**2).sum() * (down[n] ** 2).sum()
        scales[n] = was @ will / (will @ will)
    added[7] = 0  # all of it counts for the first of the two
    kept = np.sort(np.argsort(-added)[:5])
    got = join(*map(torch.from_numpy, (h, gate, up, down, weights, heard)), 5)
    assert np.array_equal(got[0].numpy(), gate[kept])
    assert np.array_equal(got[1].numpy(), up[kept])
    assert got[2].numpy() == pytest.approx((down[kept] * scales[kept, None]).T, rel=1e-4)


def test_merged_experts_are_made_of_those_that_join_them(config):
    parts = [alike(1, config, seed) for seed in range(4)]
    teacher = Pool(*(torch.cat(matrices) for matrices in zip(*(p[:4] for p in parts), strict=True)))
    near = torch.tensor([0.99, 1.01]).repeat_interleave(16).reshape(2, 16)
    teacher = teacher._replace(
        router=torch.cat([teacher.router[:1] * near, teacher.router[1:2], -teacher.router[:1]])
    )
    student = merged(teacher, torch.randn(300, 16), config, [0, 3])  # 1 is most like 0
    rows = {row.numpy().tobytes() for expert in (0, 1) for row in teacher.gate[expert]}
    assert all(row.numpy().tobytes() in rows for row in student.gate[0])
    assert not torch.equal(student.gate[0], teacher.gate[0])
    alone = merged(teacher, torch.randn(300, 16), config, [0, 1, 2, 3])
    assert all(torch.equal(a, b) for a, b in zip(alone[:4], teacher[:4], strict=True))


def test_beginnings_are_the_criteria_and_a_merger(config):
    teacher, h = alike(4, config), torch.randn(64, 16)
    scores = {
        "frequency": np.array([[4.0, 3, 2, 1]]),
        "reap": np.array([[4.0, 3, 2, 1]]),  # the same again: not tried twice
        "loss": np.array([[1.0, 2, 3, 4]]),
    }
    found = dict(pools(teacher, h, config, scores, 0, 2))
    assert list(found) == ["frequency", "loss", "merged"]
    assert torch.equal(found["loss"].router, teacher.router[[2, 3]])


# --- training ---


def toy(config, num_tokens=1024):
    """Samples of a random teacher, in two parts, and beginnings of half its size."""
    random = torch.Generator().manual_seed(3)
    shapes = (4, 32, 16), (4, 32, 16), (4, 16, 32), (4, 16)
    teacher = Pool(*(torch.randn(shape, generator=random) / 4 for shape in shapes))
    h = torch.randn(num_tokens, 16, generator=random)
    said = run_pool(h, teacher, config)
    samples = Samples(h.numpy(), said.numpy(), np.ones(num_tokens, np.float32))
    return split(samples, "cpu"), [("first", teacher.take([0, 1])), ("last", teacher.take([2, 3]))]


def test_training_lowers_the_error_on_what_it_did_not_see(config):
    config = replace(config, num_experts=2)
    parts, beginnings = toy(replace(config, num_experts=4))
    got = train(iter(beginnings), parts, config, RECIPE, torch.float32, lambda _: None)
    assert got.beginning == min(got.beginnings, key=got.beginnings.get)
    assert got.error < 0.9 * got.beginnings[got.beginning]
    assert got.error == min(epoch.held_out for epoch in got.epochs)
    assert evaluate(parts[1], got.pool, config) == pytest.approx(got.error)


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_training_that_fails_leaves_the_beginning(config, kind):
    config = replace(config, num_experts=2)
    parts, beginnings = toy(replace(config, num_experts=4))
    recipe = RECIPE._replace(learning_rate=100.0, epochs=5)
    got = train(iter(beginnings), parts, config, recipe, kind, lambda _: None)
    begun = dict(beginnings)[got.beginning].rounded(kind)
    assert got.error == got.beginnings[got.beginning]
    assert all(torch.equal(a, b) for a, b in zip(got.pool[:4], begun[:4], strict=True))
    assert len(got.epochs) == 2  # it was stopped early


def test_training_is_repeatable(config):
    config = replace(config, num_experts=2)
    results = []
    for seed in (0, 0, 1):
        parts, beginnings = toy(replace(config, num_experts=4))
        recipe = RECIPE._replace(seed=seed)
        results.append(train(iter(beginnings), parts, config, recipe, torch.float32, lambda _: 0))
    assert torch.equal(results[0].pool.gate, results[1].pool.gate)
    assert not torch.equal(results[0].pool.gate, results[2].pool.gate)


@pytest.mark.parametrize("model_type", KINDS)
def test_what_is_stored_comes_back(tmp_path, model_type):
    model = source(tmp_path, model_type)
    target = experts_target(model, tmp_path / "after", 4)
    with open_checkpoint(model) as checkpoint:
        layer = target.layers[0]
        pool = load_pool(checkpoint, layer).take([1, 3, 4, 6])
        file = tmp_path / "layer"
        write_layer(file, layer_tensors(checkpoint, target, layer, pool), {})
        back = read_pool(checkpoint, target, layer, file)
    for ours, theirs in zip(back, pool, strict=True):
        assert (ours is None) == (theirs is None)
        assert ours is None or torch.equal(ours, theirs)
