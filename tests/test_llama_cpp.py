"""GGUF files of every architecture: llama.cpp's logits and tokens, where llama-cpp-python is."""

import numpy as np
import pytest
import tiny

from tiered import Engine
from tiered.quantizing.quantize import Recipe, quantize

llama_cpp = pytest.importorskip("llama_cpp")

PROMPT, NUM_TOKENS = list(range(3, 43)), 24
STEP = 5e-3  # of the logits' range; 1e-3 was seen
# Its OLMoE wants as many heads of keys as of queries, its V2 knows Lite by the number of layers,
# and for gpt-oss it rounds YaRN's range, which the model was not trained with.
ROUNDED = {"gemma4", "gemma4_text"}  # its GELU is a table in half precision
# Of Phi-3.5-MoE it computes another model: RMSNorm in the place of LayerNorm, and weights by a
# softmax over both experts. Of Mellum it rotates all layers alike.
LEFT_OUT = {"olmoe", "deepseek_v2", "gpt_oss", "phimoe", "mellum"}

# It wants one layer that sees the whole text; Llama 4's fourth is the first. Of dots.llm1 it wants
# as many heads of keys as of queries.
SIZES = {"llama4": dict(layers=4), "llama4_text": dict(layers=4), "dots1": dict(kv_heads=4)}


def greedy(file):
    """llama.cpp's logits of the prompt and of the NUM_TOKENS tokens that it goes on with."""
    model = llama_cpp.Llama(
        str(file), n_ctx=256, n_threads=2, verbose=False, logits_all=True, type_k=0, type_v=0
    )
    model.eval(PROMPT)
    for _ in range(NUM_TOKENS):
        model.eval([int(model.scores[model.n_tokens - 1].argmax())])
    logits = model.scores[: model.n_tokens].copy()
    tokens = model.input_ids[len(PROMPT) : model.n_tokens].tolist()
    model.close()
    return logits, tokens


@pytest.mark.parametrize("model_type", sorted(set(tiny.ARCHITECTURES) - LEFT_OUT))
def test_the_same_logits_and_tokens(model_type, tmp_path):
    sizes = SIZES.get(model_type, {})
    file = tiny.gguf_checkpoint(tmp_path / "model.gguf", model_type, "f32", seed=7, **sizes)
    logits, tokens = greedy(file)
    logits = logits[: len(PROMPT)]
    with Engine(file, quantize="none", kv_dtype="f32", threads=2) as engine:
        tolerance = 1e-4 if model_type in ROUNDED else 1e-5
        assert np.abs(engine.logits(PROMPT) - logits).max() <= tolerance * np.ptp(logits)
        assert list(engine.generate_tokens(PROMPT, NUM_TOKENS)) == tokens


@pytest.mark.parametrize("kind", ["folder", "gguf"])
@pytest.mark.parametrize("model_type", ["mixtral", "olmoe", "qwen2_moe", "qwen3_moe"])
def test_it_loads_what_we_quantize(model_type, kind, tmp_path):
    """llama.cpp rounds what attention multiplies to float16 and what a BF16 head gets to BF16, so
    that a token between two experts may go to either."""
    sizes = {"kv_heads": 4} if model_type == "olmoe" else {}
    if kind == "gguf":
        before = tiny.gguf_checkpoint(tmp_path / "b.gguf", model_type, "bf16", **sizes)
    else:
        before = tiny.hf_checkpoint(tmp_path / "b", model_type, tokenizer=True, **sizes)
    file, text = tmp_path / "model.gguf", "the rain\n in  Spain, 1234 don't"
    ids = np.random.default_rng(0).integers(3, 300, 300).tolist()
    quantize(before, file, Recipe(format="q5_0", window=64, threads=2), ids)
    model = llama_cpp.Llama(str(file), n_ctx=256, n_threads=2, verbose=False, logits_all=True)
    tokens = model.tokenize(text.encode(), add_bos=False)
    model.eval(PROMPT)
    logits = model.scores[: len(PROMPT)].copy()
    model.close()
    with Engine(file, threads=2) as engine:
        assert engine.tokenizer.encode(text, parse_special=False) == tokens
        assert np.median(np.abs(engine.logits(PROMPT) - logits)) <= 0.002 * np.ptp(logits)


@pytest.mark.parametrize("format", ["q8_0", "q4_0", "q5_0", "iq4_nl", "mxfp4"])
def test_the_same_tokens_of_what_we_quantize(format, tmp_path):
    """With these formats, both round what goes into products to the same integers and scales: what
    is left is the order in which float32 are added. Where that moves a value across the middle
    between two integers, one is another: a step of 127, which moves logits by up to STEP."""
    before, file = tiny.gguf_checkpoint(tmp_path / "b.gguf", "mixtral", "f32"), tmp_path / "m.gguf"
    ids = np.random.default_rng(0).integers(3, 300, 300).tolist()
    quantize(before, file, Recipe(format=format, window=64, threads=2), ids)
    logits, tokens = greedy(file)
    with Engine(file, kv_dtype="f32", threads=2) as engine:
        ours = engine.logits(PROMPT + tokens)
        said = list(engine.generate_tokens(PROMPT, NUM_TOKENS))
    error = np.abs(ours - logits) / np.ptp(logits)
    assert np.median(error) <= 1e-6
    assert error.max() <= STEP
    parted = [place for place in range(NUM_TOKENS) if said[place] != tokens[place]]
    if parted:  # then by two tokens that are as good as alike
        row = logits[len(PROMPT) - 1 + parted[0]]
        assert row.max() - row[said[parted[0]]] <= 2 * STEP * np.ptp(logits)
