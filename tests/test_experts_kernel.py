"""A layer's experts, the dense feed-forward and the weighted sum against float64."""

from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from naive_formats import factors, random_matrix, to_float64

from cpu_kernels.chain import Chain
from cpu_kernels.combine import Combine
from cpu_kernels.experts import ExpertLayer
from cpu_kernels.feed_forward import FeedForwardLayer
from cpu_kernels.fetched import FetchedExperts
from cpu_kernels.formats import FORMATS
from cpu_kernels.isa import choose
from cpu_kernels.linear import Matrix
from cpu_kernels.team import Team
from cpu_kernels.workspace import Workspace
from tiered.backend import ExpertBiases
from tiered.experts import ExpertJobs, Routing, expert_layout, group_by_expert

ISA = choose()
CONFIG = SimpleNamespace(activation="silu", activation_limit=0.0, norm_eps=1e-5)
CLAMPED = SimpleNamespace(activation="clamped_silu", activation_limit=1.5, norm_eps=1e-5)


@pytest.fixture(scope="module")
def chains():
    with Team(1) as one, Team(2) as two:
        yield {1: Chain(one), 2: Chain(two)}


class Weights(NamedTuple):
    gate: Matrix
    up: Matrix
    down: Matrix
    scale: Matrix | None = None


def silu(x):
    return x * (1 + np.tanh(x / 2)) / 2


def expert(x, blob, layout, exact):
    """float64 result of one expert, with factors rounded as the kernels do."""

    def times(tensor, x):
        data = blob[tensor.offset : tensor.offset + tensor.nbytes]
        x, weights = factors(data, tensor.format, tensor.shape, x, ISA, exact)
        return x @ weights.T

    inner = silu(times(layout.gate, x)) * times(layout.up, x)
    return times(layout.down, inner.astype(np.float32))


def random_blob(rng, layout):
    blob = np.zeros(layout.nbytes, np.uint8)
    for tensor in layout:
        scale = 0.0005 if tensor.format.endswith("_k") else 0.02  # of about 30 times as much
        data = random_matrix(rng, tensor.format, tensor.shape, scale)
        blob[tensor.offset : tensor.offset + tensor.nbytes] = data.reshape(-1)
    return blob


def random_jobs(rng, num_tokens, num_experts, top_k):
    chosen = np.stack([rng.permutation(num_experts)[:top_k] for _ in range(num_tokens)])
    weights = rng.random((num_tokens, top_k)).astype(np.float32)
    return group_by_expert(Routing(chosen.astype(np.int32), weights)), weights


def addresses_of(blobs, layout, experts):
    return np.array([blobs[e].ctypes.data for e in experts])[:, None] + layout.offsets


def assert_close(got, want, exact):
    # An int8 activation may be rounded the other way: 1/127 of its group's largest value times one
    # weight, among products of 32 values or more.
    tolerance = 1e-5 if exact else 1e-2
    assert np.abs(got - want).max() <= tolerance * np.abs(want).max() + 1e-20


@settings(max_examples=40, deadline=None)
@given(
    formats=st.sampled_from(
        [
            ("q4_0",) * 3,
            ("q4_k", "q4_k", "q6_k"),
            ("bf16",) * 3,
            ("q4_0", "q8_0", "f32"),
            ("int4_g128", "int4_g128", "nf4"),
        ]
    ),
    num_tokens=st.integers(1, 40),
    num_experts=st.integers(1, 9),
    top_k=st.integers(1, 4),
    hidden=st.integers(1, 4),
    size=st.integers(1, 5),
    exact=st.booleans(),
    seed=st.integers(0, 100),
)
def test_experts(formats, num_tokens, num_experts, top_k, hidden, size, exact, seed):
    rng = np.random.default_rng(seed)
    unit = max(32, *(FORMATS[f].block_size for f in formats))
    layout = expert_layout(unit * hidden, unit * size, *formats)
    top_k = min(top_k, num_experts)
    jobs, _ = random_jobs(rng, num_tokens, num_experts, top_k)
    blobs = [random_blob(rng, layout) for _ in range(num_experts)]
    h = rng.standard_normal((num_tokens, unit * hidden)).astype(np.float32)
    addresses = addresses_of(blobs, layout, jobs.experts)
    results = []
    for threads in (1, 2, 3):
        layer = FetchedExperts(ExpertLayer(layout, CONFIG, ISA, exact, Workspace()))
        out = np.full((num_tokens * top_k, unit * hidden), np.nan, np.float32)
        with Team(threads) as team:
            layer.run(Chain(team), h, addresses, jobs, out)
        results.append(out)
    assert (results[0] == results[1]).all()
    assert (results[0] == results[2]).all()
    for i, e in enumerate(jobs.experts):
        pairs = jobs.pairs[jobs.starts[i] : jobs.starts[i + 1]]
        want = expert(h[pairs // top_k], blobs[e], layout, exact)
        assert_close(results[0][pairs], want, exact)


def test_jobs_one_by_one_give_the_same(chains):
    rng = np.random.default_rng(1)
    layout = expert_layout(96, 64, "q4_0", "q4_0", "q4_0")
    jobs, _ = random_jobs(rng, 13, 6, 2)
    blobs = [random_blob(rng, layout) for _ in range(6)]
    h = rng.standard_normal((13, 96)).astype(np.float32)
    layer = FetchedExperts(ExpertLayer(layout, CONFIG, ISA, False, Workspace()))
    whole, parts = np.zeros((2, 26, 96), np.float32)
    layer.run(chains[2], h, addresses_of(blobs, layout, jobs.experts), jobs, whole)
    for i in range(len(jobs.experts)):
        one = ExpertJobs(jobs.experts[i : i + 1], jobs.starts[i : i + 2], jobs.pairs)
        layer.run(chains[1], h, addresses_of(blobs, layout, one.experts), one, parts)
    assert (whole == parts).all()


@pytest.mark.parametrize("with_biases", [False, True])
@pytest.mark.parametrize("num_tokens", [1, 30])
def test_experts_of_several_layouts_are_each_what_they_are_alone(num_tokens, with_biases, chains):
    rng = np.random.default_rng(7)
    formats = ("q4_0",) * 3, ("mxfp4", "mxfp4", "q8_0"), ("f32",) * 3
    layouts = [expert_layout(96, 64, *each) for each in formats]
    kinds = np.array([0, 1, 1, 2, 0, 1], np.int32)
    blobs = [random_blob(rng, layouts[kind]) for kind in kinds]
    jobs, _ = random_jobs(rng, num_tokens, 6, 3)
    h = rng.standard_normal((num_tokens, 96)).astype(np.float32)
    biases = None
    if with_biases:
        parts = (rng.standard_normal((6, n)).astype(np.float32) for n in (64, 64, 96))
        biases = ExpertBiases(*parts)
    together, alone = np.full((2, 3 * num_tokens, 96), np.nan, np.float32)
    layer = FetchedExperts(
        ExpertLayer(layouts[0], CONFIG, ISA, False, Workspace(), biases, layouts[1:], kinds)
    )
    addresses = np.array(
        [blobs[e].ctypes.data + layouts[kinds[e]].offsets for e in jobs.experts], np.int64
    )
    layer.run(chains[2], h, addresses, jobs, together)
    for kind, layout in enumerate(layouts):
        chosen = np.flatnonzero(kinds[jobs.experts] == kind)
        if len(chosen):
            one = FetchedExperts(ExpertLayer(layout, CONFIG, ISA, False, Workspace(), biases))
            one.run(chains[1], h, addresses[chosen], jobs.take(chosen), alone)
    assert (together == alone).all()
    for wrong in (None, kinds.astype(np.int64), kinds + np.int32(1), kinds - np.int32(1)):
        with pytest.raises(ValueError, match="kinds must be int32, each less than 3"):
            ExpertLayer(layouts[0], CONFIG, ISA, False, Workspace(), None, layouts[1:], wrong)
    larger = expert_layout(96, 96, "q4_0", "q4_0", "q4_0")
    with pytest.raises(ValueError, match="do not fit together"):
        ExpertLayer(layouts[0], CONFIG, ISA, False, Workspace(), None, [larger], kinds % 2)


@pytest.mark.parametrize("num_tokens", [1, 30])
def test_biases_and_a_clamped_activation(num_tokens, chains):
    rng = np.random.default_rng(4)
    layout = expert_layout(96, 64, "mxfp4", "mxfp4", "mxfp4")
    jobs, _ = random_jobs(rng, num_tokens, 6, 2)
    blobs = [random_blob(rng, layout) for _ in range(6)]
    h = rng.standard_normal((num_tokens, 96)).astype(np.float32)
    biases = ExpertBiases(*(rng.standard_normal((6, n)).astype(np.float32) for n in (64, 64, 96)))
    results = []
    for chain in chains.values():
        layer = FetchedExperts(ExpertLayer(layout, CLAMPED, ISA, True, Workspace(), biases))
        out = np.full((2 * num_tokens, 96), np.nan, np.float32)
        layer.run(chain, h, addresses_of(blobs, layout, jobs.experts), jobs, out)
        results.append(out)
    assert (results[0] == results[1]).all()
    for i, e in enumerate(jobs.experts):
        pairs = jobs.pairs[jobs.starts[i] : jobs.starts[i + 1]]
        rows = h[pairs // 2].astype(np.float64)
        gate, up, down = (
            to_float64(blobs[e][t.offset : t.offset + t.nbytes], t.format, t.shape) for t in layout
        )
        g = np.minimum(rows @ gate.T + biases.gate[e], 1.5)
        u = np.clip(rows @ up.T + biases.up[e], -1.5, 1.5)
        want = (g / (1 + np.exp(-1.702 * g)) * (u + 1)) @ down.T + biases.down[e]
        assert_close(results[0][pairs], want, True)


def test_no_jobs(chains):
    layout = expert_layout(64, 32, "q4_0", "q4_0", "q4_0")
    layer = FetchedExperts(ExpertLayer(layout, CONFIG, ISA, False, Workspace()))
    out = np.ones((2, 64), np.float32)
    empty = ExpertJobs(np.zeros(0, np.int32), np.zeros(1, np.int32), np.zeros(0, np.int32))
    h = np.zeros((1, 64), np.float32)
    layer.run(chains[2], h, np.zeros((0, 3), np.int64), empty, out)
    assert (out == 1).all()


@pytest.mark.parametrize("shape", [(1, 8, 2048), (5, 2, 70), (40, 3, 64)])
def test_combine(shape, chains):
    num_tokens, top_k, hidden = shape
    rng = np.random.default_rng(2)
    x = rng.standard_normal((num_tokens, hidden)).astype(np.float32)
    out = rng.standard_normal((num_tokens * top_k, hidden)).astype(np.float32)
    weights = rng.random((num_tokens, top_k)).astype(np.float32)
    want = x + (out.reshape(num_tokens, top_k, hidden) * weights[..., None]).sum(1)
    results = []
    for chain in chains.values():
        got = x.copy()
        Combine().run(chain, got, out, weights)
        results.append(got)
    assert np.abs(results[0] - want).max() < 1e-5
    assert (results[0] == results[1]).all()


@pytest.mark.parametrize("num_rows", [1, 3, 30])
@pytest.mark.parametrize("with_norm", [False, True])
@pytest.mark.parametrize("with_scale", [False, True])
def test_feed_forward(num_rows, with_norm, with_scale, chains):
    rng = np.random.default_rng(3)
    layout = expert_layout(192, 96, "q4_0", "q8_0", "q4_1")
    blob = random_blob(rng, layout)
    matrices = [
        Matrix(blob[t.offset : t.offset + t.nbytes], t.format, t.shape, ISA) for t in layout
    ]
    scale = random_matrix(rng, "f32", (1, 192), 1.0)
    x = rng.standard_normal((num_rows, 192)).astype(np.float32)
    norm = rng.random(192).astype(np.float32)
    h = rng.standard_normal((num_rows, 192)).astype(np.float32)
    want_h = x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * norm if with_norm else h
    want = expert(want_h, blob, layout, False)
    if with_scale:
        want = want / (1 + np.exp(-want_h @ to_float64(scale, "f32", (1, 192)).T))
    scale = Matrix(scale.reshape(-1), "f32", (1, 192), ISA) if with_scale else None
    results = []
    for chain in chains.values():
        layer = FeedForwardLayer(
            Weights(*matrices, scale), CONFIG, ISA, False, Workspace(), norm if with_norm else None
        )
        got = x.copy()
        layer.run(chain, got, None if with_norm else h)
        results.append(got)
    assert_close(results[0] - x, want, False)
    assert (results[0] == results[1]).all()
