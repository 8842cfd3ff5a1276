"""Recurrent layers in torch: chunks of tokens and single ones, against float64, token by token."""

from typing import NamedTuple

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from gpu_backend import delta, mamba2, recurrent  # noqa: E402

HEADS, KEY_DIM, VALUE_DIM = 3, 8, 16
pytestmark = pytest.mark.usefixtures("one_torch_thread")


class Text(NamedTuple):
    """q, k, v: [num_tokens, heads, size]; the others: [num_tokens, heads]."""

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    logs: np.ndarray
    factors: np.ndarray  # betas, or steps


def random_text(num_tokens, seed=0):
    rng = np.random.default_rng(seed)
    q, k = rng.standard_normal((2, num_tokens, HEADS, KEY_DIM))
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    # Some heads forget at once, some hardly.
    logs = -rng.exponential([0.01, 1.0, 60.0], (num_tokens, HEADS))
    v = rng.standard_normal((num_tokens, HEADS, VALUE_DIM))
    return Text(q, k, v, logs, rng.uniform(0, 1, (num_tokens, HEADS)))


def naive_scan(state, text, written):
    """One token and head after the other; `written(S, k, v, factor)` is stored at its key."""
    out = np.empty_like(text.v)
    for token in range(len(out)):
        for head in range(HEADS):
            S, k, v = state[head], text.k[token, head], text.v[token, head]
            S *= np.exp(text.logs[token, head])
            S += np.outer(k, written(S, k, v, text.factors[token, head]))
            out[token, head] = text.q[token, head] @ S
    return out


def naive_delta(state, text):
    return naive_scan(state, text, lambda S, k, v, beta: (v - k @ S) * beta)


def naive_mamba2(state, text):
    return naive_scan(state, text, lambda S, k, v, step: step * v)


def in_torch(text):
    """float32, but for the logarithms."""
    arrays = [torch.from_numpy(array) for array in text]
    return [
        a if name == "logs" else a.float() for name, a in zip(Text._fields, arrays, strict=True)
    ]


@pytest.mark.parametrize("sizes", [[1, 1, 1], [150], [1, 63, 64, 2, 20]])
@pytest.mark.parametrize(("module", "naive"), [(delta, naive_delta), (mamba2, naive_mamba2)])
def test_scans(module, naive, sizes):
    text = random_text(sum(sizes))
    state = np.random.default_rng(1).standard_normal((HEADS, KEY_DIM, VALUE_DIM))
    memory = torch.from_numpy(state).float()
    expected = naive(state, text)
    parts = zip(*(t.split(sizes) for t in in_torch(text)), strict=True)
    got = torch.cat([module.scan(memory, *part) for part in parts])
    # Float32 sums of at most 64 + 8 products, and of what they are made of.
    assert np.abs(got.numpy() - expected).max() <= 1e-5 * np.abs(expected).max()
    assert np.abs(memory.numpy() - state).max() <= 1e-5 * np.abs(state).max()


@pytest.mark.parametrize("sizes", [[5], [1, 1, 3], [2, 3]])
def test_convolutions_go_on(sizes):
    rng = np.random.default_rng(2)
    x, weights = rng.standard_normal((5, 4)), rng.standard_normal((3, 4))
    bias = rng.standard_normal(4)
    padded = np.concatenate([np.zeros((2, 4)), x])
    expected = sum(padded[i : i + 5] * weights[i] for i in range(3)) + bias
    expected = expected / (1 + np.exp(-expected))
    x, weights, bias = (torch.from_numpy(a).float() for a in (x, weights, bias))
    history, parts = torch.zeros(2, 4), []
    for part in x.split(sizes):
        parts.append(recurrent.convolve(part, history, weights, bias, activated=True))
    np.testing.assert_allclose(torch.cat(parts).numpy(), expected, atol=1e-6)
    assert torch.equal(history, x[-2:])


def test_rows_of_a_text_must_follow_each_other():
    class Batch(NamedTuple):
        sequences: np.ndarray
        positions: np.ndarray
        states: list

    with pytest.raises(ValueError, match="in a run"):
        recurrent.runs_of(Batch(np.array([0, 1, 0]), np.arange(3), [None, None]))
