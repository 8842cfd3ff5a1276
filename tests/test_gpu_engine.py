"""The engine on a GPU's arithmetic (torch's CPU device): the same bits whatever is where."""

import numpy as np
import pytest
from instructions import AS_ON_A_GPU

from tiered import Engine
from tiered.demo import random_tiny_model

pytest.importorskip("torch")
pytestmark = pytest.mark.usefixtures("one_torch_thread")

# Some experts get more rows than the CPU computes at once with a GPU's bits.
PROMPT = np.random.default_rng(0).integers(3, 256, 80).tolist()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return random_tiny_model(tmp_path_factory.mktemp("model"))


def run(model, **choices):
    with Engine(model, device="sim", threads=2, **choices) as engine:
        logits = [engine.logits(PROMPT) for _ in range(2)]
        return logits, list(engine.generate_tokens(PROMPT, 12)), engine


@pytest.fixture(scope="module")
def expected(model):
    return run(model)


def test_vram_and_ram_never_change_a_bit(model, expected):
    logits, tokens, engine = expected
    assert np.array_equal(*logits)
    nbytes = max(engine.store.blob_bytes)
    used = engine.shares[0].fixed + engine.shares[0].kv
    for choices in (
        dict(vram=used + 3 * nbytes),
        dict(vram=used + 6 * nbytes),
        dict(expert_ram=4 * nbytes, vram=used + 5 * nbytes),
        dict(look_ahead=0),
    ):
        got, got_tokens, _ = run(model, **choices)
        assert np.array_equal(got[0], logits[0]) and np.array_equal(got[1], logits[0])
        assert got_tokens == tokens


def test_too_little_vram_names_what_works(model):
    with pytest.raises(MemoryError, match="give --vram at least"):
        run(model, vram=1 << 16)


def test_the_cpu_engine_is_near(model, expected):
    with Engine(model, device="cpu", threads=2, isa=AS_ON_A_GPU) as engine:
        logits = engine.logits(PROMPT)
    assert np.abs(logits - expected[0][0]).max() <= 2e-2 * np.ptp(logits)
