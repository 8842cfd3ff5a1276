"""What only a card can tell: kernels, copies and graphs as other tests have them on the CPU.

    pytest -m gpu

is all that a machine with a CUDA device has to run. TIERED_TEST_DEVICE=sim tries the tests
themselves on torch's CPU device.
"""

import os

import naive_formats
import numpy as np
import pytest
import tiny

from cpu_kernels.formats import FORMATS
from tiered import Engine
from tiered.demo import random_tiny_model

torch = pytest.importorskip("torch")
from gpu_backend import bench, reference  # noqa: E402
from gpu_backend.arrays import Activations, Quantized  # noqa: E402
from gpu_backend.backend import GpuBackend  # noqa: E402
from gpu_backend.formats import QUANTIZED  # noqa: E402

DEVICE = os.environ.get("TIERED_TEST_DEVICE", "cuda:0")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        DEVICE.startswith("cuda") and not torch.cuda.is_available(), reason="needs a CUDA device"
    ),
]
PROMPT = np.random.default_rng(0).integers(3, 256, 80).tolist()
NUM_TOKENS = 80  # the cache's second page is begun


@pytest.fixture(scope="module")
def card():
    backend = GpuBackend(DEVICE.replace("sim", "cpu"))
    yield backend
    backend.close()


@pytest.mark.parametrize("num_rows", [1, 3, 40])  # decode kernel, and matrix products
@pytest.mark.parametrize("format", QUANTIZED)
def test_products_are_the_reference_s(card, format, num_rows):
    rng, device = np.random.default_rng(1), card.device.torch_device
    shape = 96, 2 * max(256, FORMATS[format].block_size)
    blocks = torch.from_numpy(naive_formats.random_matrix(rng, format, shape).reshape(-1))
    num_blocks = shape[0] * shape[1] // FORMATS[format].block_size
    planes, again = torch.empty_like(blocks), torch.empty_like(blocks, device=device)
    reference.rearrange(blocks, planes, format, num_blocks)
    card.arithmetic.rearrange(blocks.to(device), again, format, num_blocks)
    assert torch.equal(again.cpu(), planes)
    x = torch.from_numpy(rng.standard_normal((num_rows, shape[1]), np.float32))
    a, there = reference.quantize(x), card.arithmetic.quantize(x.to(device))
    assert all(map(torch.equal, a, (each.cpu() for each in there)))
    got = card.arithmetic.linear(Activations(*there), Quantized(again, format, shape))
    assert torch.equal(got.cpu(), reference.linear(a, Quantized(planes, format, shape)))


def run(model, graphs=True, **choices):
    """Logits of a prompt, a text, and what became of graphs."""
    with Engine(model, **{"device": DEVICE, "threads": 2, "context": 256, **choices}) as engine:
        for one in engine.backend.cards if not graphs else ():
            one.graphs.record = None
        logits = engine.logits(PROMPT)
        texts = [list(engine.generate_tokens(PROMPT, NUM_TOKENS)) for _ in range(2)]
        assert texts[0] == texts[1]
        assert not any(one.graphs.problem for one in engine.backend.cards)
        return logits, texts[0], engine


def test_rates_of_kernels():
    """As `tiered bench --kernels --device cuda:0 --json` has them, of small matrices."""
    report = bench.kernel_report(
        DEVICE.replace("sim", "cpu"), None, lambda *_: None, formats=("q4_0", "mxfp4"),
        shapes=((1024, 2048),), decode_bytes=1 << 22, prefill_bytes=1, peak_size=256,
    )  # fmt: skip
    assert all(row.get("gb_s", 1) > 0 and row.get("gops", 1) > 0 for row in report["kernels"])
    assert len(report["kernels"]) == 2 * 3


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return random_tiny_model(tmp_path_factory.mktemp("model"))


def test_the_bits_are_the_same_whatever_is_where_and_with_graphs(model):
    logits, tokens, engine = run(model)
    nbytes, share = max(engine.store.blob_bytes), engine.shares[0]
    for choices in (
        dict(graphs=False),
        dict(vram=share.needed + 64),
        dict(vram=share.needed + 3 * nbytes, expert_ram=4 * nbytes),
    ):
        got, text, _ = run(model, **choices)
        assert np.array_equal(got, logits) and text == tokens


@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss", "deepseek_v2", "gemma4", "llama4"])
def test_logits_are_near_the_cpu_s(model_type, tmp_path):
    """Attention adds in another order, so that an activation may round to the next int8 value."""
    model = tiny.hf_checkpoint(tmp_path / model_type, model_type, layers=4)
    logits, _, _ = run(model)
    with Engine(model, device="cpu", threads=2) as engine:
        expected = engine.logits(PROMPT)
    assert np.abs(logits - expected).max() <= 3e-2 * np.ptp(expected)
