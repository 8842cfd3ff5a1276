"""Every architecture on a GPU's arithmetic (torch's CPU device), beside the CPU's engine."""

import numpy as np
import pytest
import tiny

from tiered import Engine

torch = pytest.importorskip("torch")

PROMPT = np.random.default_rng(0).integers(3, 300, 28).tolist()
QUICK = "gpt_oss", "deepseek_v3", "gemma4_text", "phimoe", "llama4_text", "qwen3_next"
QUICK += "granitemoehybrid", "lfm2_moe"  # each has parts that the others have not
ARCHITECTURES = [
    name if name in QUICK else pytest.param(name, marks=pytest.mark.slow)
    for name in tiny.ARCHITECTURES
    if name != tiny.DENSE
]


@pytest.fixture(scope="module", autouse=True)
def one_torch_thread():
    """So few numbers are sooner computed than handed out."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


def run(model, **choices):
    """Logits by chunks of seven tokens, which the CPU may compute beside the GPU, and a text."""
    with Engine(model, threads=2, prefill_chunk=7, kv_dtype="f32", **choices) as engine:
        logits = engine.logits(PROMPT)
        return logits, list(engine.generate_tokens(PROMPT, 6)), engine


def check(model):
    expected, expected_tokens, _ = run(model, device="cpu")
    logits, tokens, engine = run(model, device="sim")
    # The same integers, other orders of float additions: an activation may round to the next int8
    # value, which is 1/254 of its group's largest.
    assert np.abs(logits - expected).max() <= 2e-2 * np.ptp(expected)
    assert tokens == expected_tokens
    nbytes, used = max(engine.store.blob_bytes), engine.plan.dense + engine.plan.kv
    again, tokens, engine = run(
        model, device="sim", vram=used + (engine.config.top_k + 1) * nbytes, expert_ram=6 * nbytes
    )
    assert np.array_equal(again, logits) and tokens == expected_tokens
    source = engine.decoder.source
    assert source.hits and source.computed_in_ram + source.copies
    assert engine.stats.new_tokens == len(tokens)


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_near_the_cpu_and_the_same_bits_whatever_is_resident(model_type, folder):
    check(tiny.hf_checkpoint(folder / model_type, model_type))


def test_gpt_oss_as_it_is_published(folder):
    formats = {"_exps": "mxfp4", "attn": "q8_0"}
    check(tiny.gguf_checkpoint(folder / "gpt_oss.gguf", "gpt_oss", format="f32", formats=formats))
