"""Every architecture on a GPU's arithmetic (torch's CPU device), beside the CPU's engine."""

import numpy as np
import pytest
import tiny

from tiered import Engine

pytest.importorskip("torch")

PROMPT = np.random.default_rng(0).integers(3, 300, 28).tolist()
ARCHITECTURES = [name for name in tiny.ARCHITECTURES if name != tiny.DENSE]
pytestmark = pytest.mark.usefixtures("one_torch_thread")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


def run(model, kv_dtype="f32", **choices):
    """Logits by chunks of seven tokens, which the CPU may compute beside the GPU, and a text."""
    with Engine(model, threads=2, prefill_chunk=7, kv_dtype=kv_dtype, **choices) as engine:
        logits = engine.logits(PROMPT)
        return logits, list(engine.generate_tokens(PROMPT, 6)), engine


def check(model):
    expected, expected_tokens, _ = run(model, device="cpu")
    logits, tokens, engine = run(model, device="sim")
    # The same integers, other orders of float additions: an activation may round to the next int8
    # value, which is 1/254 of its group's largest.
    assert np.abs(logits - expected).max() <= 2e-2 * np.ptp(expected)
    assert tokens == expected_tokens
    nbytes, share = max(engine.store.blob_bytes), engine.shares[0]
    again, tokens, engine = run(model, device="sim", vram=share.needed + 64, expert_ram=6 * nbytes)
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


@pytest.mark.parametrize("kv_dtype", ["f16", "int8"])
@pytest.mark.parametrize("model_type", ["gpt_oss", "deepseek_v2"])
def test_keys_and_values_are_kept_as_the_cpu_keeps_them(model_type, kv_dtype, folder):
    model = tiny.hf_checkpoint(folder / f"{model_type}-{kv_dtype}", model_type)
    expected, *_ = run(model, device="cpu", kv_dtype=kv_dtype)
    logits, *_ = run(model, device="sim", kv_dtype=kv_dtype)
    assert np.abs(logits - expected).max() <= 2e-2 * np.ptp(expected)  # as above


def test_texts_of_a_recurrent_model_keep_to_themselves(folder):
    """Two sequences, going on in turn, as a server has them: each as if it were alone."""
    model = tiny.hf_checkpoint(folder / "two", "granitemoehybrid")
    with Engine(model, device="sim", threads=2, kv_tokens=512, context=256) as engine:
        alone = [list(engine.generate_tokens(p, 6)) for p in (PROMPT, PROMPT[5:])]
        texts = [engine.open_sequence() for _ in range(2)]
        streams = [
            engine.generate_tokens(p, 6, sequence=text)
            for p, text in zip((PROMPT, PROMPT[5:]), texts, strict=True)
        ]
        together = list(zip(*streams, strict=True))
    assert [list(tokens) for tokens in zip(*together, strict=True)] == alone
