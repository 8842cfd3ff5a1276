"""The whole CPU backend against the one in plain NumPy: a layer of each kind, forward."""

import numpy as np
import pytest
from naive import NaiveBackend
from naive_formats import random_matrix

from cpu_kernels.backend import CpuBackend
from cpu_kernels.isa import available
from tiered.backend import AttentionWeights, Batch, FeedForwardWeights, RouterWeights
from tiered.config import ModelConfig
from tiered.experts import expert_layout, group_by_expert

CONFIG = ModelConfig(
    model_type="test", num_layers=1, hidden_size=96, vocab_size=50, context_length=64,
    num_heads=4, num_kv_heads=2, head_dim=16, norm_eps=1e-5, num_experts=5, top_k=2, expert_size=64,
)  # fmt: skip


def forward(backend, threads=1):
    """Logits of 7 tokens after one layer of attention, experts and a dense feed-forward."""
    rng = np.random.default_rng(1)
    c = CONFIG

    def matrix(rows, columns, format="q8_0", scale=0.002):
        data = random_matrix(rng, format, (rows, columns), scale).reshape(-1)
        return backend.matrix(data, format, (rows, columns))

    hidden = c.hidden_size
    norm = rng.uniform(0.5, 1.5, hidden).astype(np.float32)
    weights = AttentionWeights(
        norm, matrix(64, hidden), matrix(32, hidden), matrix(32, hidden), matrix(hidden, 64)
    )
    attention = backend.attention_layer(weights, c)
    router = backend.router_layer(RouterWeights(norm, matrix(5, hidden, "f32", 1.0)), c)
    layout = expert_layout(hidden, c.expert_size, "q4_0", "q4_1", "q8_0")
    blobs = np.zeros((5, layout.nbytes), np.uint8)
    for blob in blobs:
        for t in layout:
            data = random_matrix(rng, t.format, t.shape, 0.01)
            blob[t.offset : t.offset + t.nbytes] = data.reshape(-1)
    experts = backend.expert_layer(layout, c)
    shared = backend.feed_forward_layer(
        FeedForwardWeights(
            matrix(32, hidden), matrix(32, hidden), matrix(hidden, 32), matrix(1, hidden, "f32")
        ),
        c,
    )
    dense = FeedForwardWeights(matrix(32, hidden), matrix(32, hidden), matrix(hidden, 32))
    dense = backend.feed_forward_layer(dense, c, norm)
    table = matrix(c.vocab_size, hidden, "f16", 1.0)
    output = backend.output_layer(norm, table, c)
    kv = backend.kv_pages(c, 2, 16, "f32")
    batch = Batch(
        np.arange(3, 10, dtype=np.int32),
        np.arange(7, dtype=np.int32),
        np.zeros(7, np.int32),
        np.array([[1, 0]], np.int32),
    )
    x = backend.embed(table, batch.tokens)
    backend.attention(x, attention, kv, 0, batch)
    h, routing = backend.route(x, router)
    jobs = group_by_expert(routing)
    out = backend.pair_outputs(routing.experts.size)
    addresses = np.array([blobs[e].ctypes.data for e in jobs.experts])[:, None] + layout.offsets
    backend.experts(h, experts, addresses, jobs, out)
    backend.combine(x, out, routing.weights)
    backend.feed_forward(x, h, shared)
    guess = backend.guess(x, h, router)
    assert (np.asarray(guess.experts) == np.asarray(routing.experts)).all()
    backend.feed_forward(x, None, dense)
    return backend.head(x, np.array([2, 6], np.int32), output).copy()


@pytest.mark.parametrize("isa", available())
def test_exact_backend_is_the_naive_one(isa):
    want = forward(NaiveBackend())
    backend = CpuBackend(2, isa, exact=True)
    got = forward(backend)
    backend.close()
    assert np.abs(got - want).max() < 1e-4 * np.abs(want).max()


@pytest.mark.parametrize("isa", available())
def test_integer_backend_is_near_and_the_same_for_any_threads(isa):
    want = forward(NaiveBackend())
    results = []
    for threads in (1, 2, 3):
        backend = CpuBackend(threads, isa)
        results.append(forward(backend))
        backend.close()
    # int8 activations: 1/254 of a group's largest, through five products
    assert np.abs(results[0] - want).max() < 0.03 * np.abs(want).max()
    assert (results[0] == results[1]).all()
    assert (results[0] == results[2]).all()
