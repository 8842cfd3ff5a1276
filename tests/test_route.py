from types import SimpleNamespace

import naive
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cpu_kernels.chain import Chain
from cpu_kernels.embed import Embedding
from cpu_kernels.head import Head, OutputLayer
from cpu_kernels.isa import choose
from cpu_kernels.linear import Matrix
from cpu_kernels.merge import Merge, MergeLayer
from cpu_kernels.route import Router, RouterLayer
from cpu_kernels.team import Team
from tiered.backend import MergeWeights, RouterWeights

EPS = 1e-5


@pytest.fixture(scope="module", params=[1, 2])
def chain(request):
    with Team(request.param) as team:
        yield Chain(team)


def float_matrix(weight):
    data = np.ascontiguousarray(weight, np.float32)
    return Matrix(data.view(np.uint8).reshape(-1), "f32", data.shape, choose())


def naive_norm(x, norm):
    x = x.astype(np.float64)
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + EPS) * norm


def naive_choice(logits, c, correction=None):
    """Experts and weights of one row, from float64 logits."""
    scores = np.exp(logits - logits.max())
    scores /= scores.sum()
    if c.router_scoring == "sigmoid":
        scores = 1 / (1 + np.exp(-logits))
    choices = scores if correction is None else scores + correction
    size = len(scores) // c.expert_groups
    num_best = 2 if c.router_scoring == "sigmoid" else 1
    groups = [sorted(choices[g * size :][:size])[-num_best:] for g in range(c.expert_groups)]
    ranked = sorted(range(c.expert_groups), key=lambda g: (-sum(groups[g]), g))
    allowed = [e for e in range(len(scores)) if e // size in ranked[: c.used_groups]]
    experts = sorted(allowed, key=lambda e: (-choices[e], e))[: c.top_k]
    weights = scores[experts]
    return experts, c.routing_scale * (weights / weights.sum() if c.normalize_top_k else weights)


def config(num_experts, top_k, hidden_size, normalize=True, **more):
    given = dict(router_scoring="softmax", routing_scale=1.0, expert_groups=1, used_groups=1)
    given |= dict(logit_softcap=0.0, router_jitter=0.0)
    return SimpleNamespace(
        num_experts=num_experts,
        top_k=top_k,
        hidden_size=hidden_size,
        normalize_top_k=normalize,
        norm_eps=EPS,
        **(given | more),
    )


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize(
    ("num_experts", "top_k", "hidden_size"), [(8, 2, 64), (128, 8, 96), (60, 4, 48), (5, 5, 7)]
)
def test_the_best_experts_are_chosen(chain, num_experts, top_k, hidden_size, normalize):
    random = np.random.default_rng(num_experts)
    for num_rows in (1, 3, 20):
        x = random.standard_normal((num_rows, hidden_size)).astype(np.float32)
        norm = random.random(hidden_size) + 0.5
        weight = random.standard_normal((num_experts, hidden_size))
        c = config(num_experts, top_k, hidden_size, normalize)
        layer = RouterLayer(RouterWeights(norm, float_matrix(weight)), c)
        router = Router(chain)
        h, routing = router.route(x, layer)
        reference = naive_norm(x, norm)
        np.testing.assert_allclose(h, reference, rtol=1e-5, atol=1e-6)
        for row in range(num_rows):
            experts, weights = naive_choice(weight @ reference[row], c)
            assert routing.experts[row].tolist() == experts
            # A logit of size 10 is known to about 1e-6 of itself, and its exponential as well.
            np.testing.assert_allclose(routing.weights[row], weights, rtol=5e-5)
        guess = router.guess(x, h, layer)
        assert (guess.experts == routing.experts).all()
        assert (guess.weights == routing.weights).all()


@pytest.mark.parametrize(
    "more",
    [
        dict(router_scoring="sigmoid"),
        dict(router_scoring="sigmoid", routing_scale=2.5, expert_groups=4, used_groups=2),
        dict(expert_groups=8, used_groups=3, routing_scale=16.0),
        dict(router_scoring="sigmoid", expert_groups=32, used_groups=8),
    ],
)
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("corrected", [False, True])
def test_other_scores_corrections_and_groups(chain, more, normalize, corrected):
    c, random = config(32, 4, 32, normalize, **more), np.random.default_rng(5)
    x = random.standard_normal((40, 32)).astype(np.float32)
    weight = random.standard_normal((32, 32)) / 4  # sigmoids of larger logits are equal
    correction = random.standard_normal(32).astype(np.float32) if corrected else None
    layer = RouterLayer(RouterWeights(np.ones(32), float_matrix(weight), correction), c)
    _, routing = Router(chain).route(x, layer)
    for row, h in enumerate(naive_norm(x, np.ones(32))):
        experts, weights = naive_choice(weight @ h, c, correction)
        assert routing.experts[row].tolist() == experts
        np.testing.assert_allclose(routing.weights[row], weights, rtol=5e-5)


@pytest.mark.parametrize("num_rows", [1, 37])
def test_a_norm_and_scales_of_its_own(chain, num_rows):
    """Experts see x by one norm, the router by another; its weights are scaled expert by expert."""
    c, random = config(8, 3, 32), np.random.default_rng(6)
    x = random.standard_normal((num_rows, 32)).astype(np.float32)
    norm, own_norm = random.random((2, 32)).astype(np.float32) + 0.5
    scales = random.random(8).astype(np.float32) + 0.5
    weight = random.standard_normal((8, 32))
    layer = RouterLayer(
        RouterWeights(norm, float_matrix(weight), own_norm=own_norm, scales=scales), c
    )
    router = Router(chain)
    h, routing = router.route(x, layer)
    np.testing.assert_allclose(h, naive_norm(x, norm), rtol=1e-5, atol=1e-6)
    for row, own in enumerate(naive_norm(x, own_norm)):
        experts, weights = naive_choice(weight @ own, c)
        assert routing.experts[row].tolist() == experts
        np.testing.assert_allclose(routing.weights[row], weights * scales[experts], rtol=5e-5)
    guess = router.guess(x, np.full_like(h, np.nan), layer)
    assert (guess.experts == routing.experts).all() and (guess.weights == routing.weights).all()


@pytest.mark.parametrize("num_rows", [1, 37])
def test_a_sparse_mixer_weights_among_those_nearly_as_good(chain, num_rows):
    c = config(8, 2, 32, router_scoring="sparsemixer", router_jitter=0.1)
    random = np.random.default_rng(8)
    x = random.standard_normal((num_rows, 32)).astype(np.float32)
    norm = np.stack([random.random(32) + 0.5, random.standard_normal(32)])
    weight = random.standard_normal((8, 32))
    layer = RouterLayer(RouterWeights(norm, float_matrix(weight)), c)
    h, routing = Router(chain).route(x, layer)
    reference = naive.layer_norm(x.astype(np.float64), norm, EPS)
    np.testing.assert_allclose(h, reference, rtol=1e-5, atol=1e-5)
    for row in range(num_rows):
        experts, weights = naive.sparse_mixer(weight @ reference[row], 2, 0.1)
        assert routing.experts[row].tolist() == experts
        np.testing.assert_allclose(routing.weights[row], weights, rtol=5e-5)


def test_what_a_sparse_mixer_does_with_ties_and_distances(chain):
    def weights(logits):
        weight = float_matrix(np.eye(4))
        c = config(4, 2, 4, router_scoring="sparsemixer", router_jitter=0.01)
        logits = np.array([logits], np.float32)
        return Router(chain).guess(
            logits, logits, RouterLayer(RouterWeights(np.ones(4), weight), c)
        )

    alone = weights([5, 1, -3, 0])
    assert alone.experts.tolist() == [[0, 1]] and alone.weights.tolist() == [[1, 1]]
    tied = weights([2, 2, 2, -9])
    np.testing.assert_allclose(tied.weights, [[1 / 3, 1 / 2]], rtol=1e-6)
    assert weights([0, 0, 0, 0]).weights[0, 0] == 0.25  # 0 / 0 is not too far below
    assert weights([300, 1, 1, -300]).weights.tolist() == [[1, 0.5]]
    assert np.isnan(weights([np.nan] * 4).weights).all()


@pytest.mark.parametrize("num_rows", [1, 37])
def test_branches_are_normed_and_merged(chain, num_rows):
    random = np.random.default_rng(7)
    x, dense, routed = random.standard_normal((3, num_rows, 33)).astype(np.float32)
    norms = random.random((3, 33)).astype(np.float32) + 0.5
    layer, merge = MergeLayer(MergeWeights(*norms, 0.7), config(8, 2, 33)), Merge(chain)
    branches = merge.branches(x)
    assert all((branch == 0).all() and branch.shape == x.shape for branch in branches)
    branches[0][:], branches[1][:] = dense, routed
    sum = naive_norm(dense, norms[0]) + naive_norm(routed, norms[1])
    expected = (x + naive_norm(sum, norms[2])) * 0.7
    merge.run(x, *branches, layer)
    np.testing.assert_allclose(x, expected, rtol=1e-5, atol=1e-5)


def route_logits(chain, logits, top_k, normalize=True):
    """Routing for given logits: the router is the identity, and so is h."""
    logits = np.asarray(logits, np.float32)
    size = logits.shape[1]
    layer = RouterLayer(
        RouterWeights(np.ones(size), float_matrix(np.eye(size))),
        config(size, top_k, size, normalize),
    )
    return Router(chain).guess(logits, logits, layer)


def test_of_equal_scores_the_first_expert_wins(chain):
    routing = route_logits(chain, [[0, 1, 1, 0, 1], [2, 2, 2, 2, 2]], 3)
    assert routing.experts.tolist() == [[1, 2, 4], [0, 1, 2]]
    np.testing.assert_allclose(routing.weights, 1 / 3, rtol=1e-6)


@settings(deadline=None, max_examples=50)
@given(
    st.integers(1, 40).flatmap(
        lambda size: st.lists(
            st.lists(st.floats(-(2.0**99), 2.0**99, width=32), min_size=size, max_size=size),
            min_size=1,
            max_size=3,
        )
    ),
    st.data(),
)
def test_any_logits_give_distinct_experts_and_sane_weights(chain, logits, data):
    top_k = data.draw(st.integers(1, len(logits[0])))
    routing = route_logits(chain, logits, top_k)
    for experts, weights in zip(*routing, strict=True):
        assert len(set(experts.tolist())) == top_k
        assert (experts >= 0).all() and (experts < len(logits[0])).all()
        assert (weights >= 0).all() and (np.diff(weights) <= 0).all()
        np.testing.assert_allclose(weights.sum(), 1, rtol=1e-5)


def test_a_router_that_is_not_a_number_still_chooses_experts(chain):
    routing = route_logits(chain, [[np.nan] * 6], 3)
    assert sorted(routing.experts[0].tolist()) == [0, 1, 2]


def test_a_router_of_another_shape_is_refused():
    with pytest.raises(ValueError, match="router must have shape"):
        RouterLayer(RouterWeights(np.ones(4), float_matrix(np.eye(4))), config(8, 2, 4))


def test_embedding_and_head(chain):
    random = np.random.default_rng(0)
    vocab_size, hidden_size = 50, 33
    table, norm = random.standard_normal((vocab_size, hidden_size)), random.random(hidden_size)
    matrix = float_matrix(table)
    tokens = np.array([3, 49, 0, 3], np.int32)
    x = Embedding(chain).run(matrix, tokens, 1.0)
    assert (x == table[tokens].astype(np.float32)).all()
    layer = OutputLayer(norm, matrix, config(0, 0, hidden_size))
    head = Head(chain)
    logits = head.run(x, np.array([2, 0]), layer)
    reference = naive_norm(x[[2, 0]], norm) @ table.T
    np.testing.assert_allclose(logits, reference, rtol=1e-4, atol=1e-4)
    both = np.stack([norm, random.standard_normal(hidden_size)])
    layer = OutputLayer(both, matrix, config(0, 0, hidden_size))
    centred = naive.layer_norm(x[[2, 0]].astype(np.float64), both, EPS)
    logits = head.run(x, np.array([2, 0]), layer)
    np.testing.assert_allclose(logits, centred @ table.T, rtol=1e-4, atol=1e-4)
    capped = OutputLayer(norm, matrix, config(0, 0, hidden_size, logit_softcap=2.5))
    logits = head.run(x, np.array([2, 0]), capped)
    np.testing.assert_allclose(logits, 2.5 * np.tanh(reference / 2.5), rtol=1e-4, atol=1e-4)
    scaled = Embedding(chain).run(matrix, tokens, 3.5)
    assert (scaled == table[tokens].astype(np.float32) * np.float32(3.5)).all()
    assert head.run(x, np.array([], np.int32), layer).shape == (0, vocab_size)
    with pytest.raises(IndexError, match="rows"):
        head.run(x, np.array([4]), layer)
    with pytest.raises(IndexError, match="token"):
        Embedding(chain).run(matrix, np.array([50]), 1.0)
