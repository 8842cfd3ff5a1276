"""Logits and tokens against a file of what transformers said: see golden.py."""

import golden
import numpy as np
import pytest
import tiny

from tiered import Engine


@pytest.mark.parametrize("model_type", tiny.ARCHITECTURES)
def test_golden(model_type, tmp_path):
    expected = np.load(golden.FILE)
    folder = golden.checkpoint(tmp_path / "model", model_type)
    if golden.digest(folder) != str(expected[f"{model_type}.digest"]):
        pytest.skip("this NumPy draws other random numbers: make the file anew with golden.py")
    logits = expected[f"{model_type}.logits"]
    with Engine(folder, quantize="none", kv_dtype="f32", threads=2) as engine:
        got = engine.logits(golden.PROMPT)[-golden.NUM_ROWS :]
        assert np.abs(got - logits).max() <= 1e-5 * np.ptp(logits)
        tokens = list(engine.generate_tokens(golden.PROMPT, golden.NUM_TOKENS))
    assert tokens == expected[f"{model_type}.tokens"].tolist()


def test_a_gguf_file_that_llama_cpp_computes_otherwise(tmp_path):
    expected = np.load(golden.FILE)
    folder = golden.checkpoint(tmp_path / "model", "phimoe")
    if golden.digest(folder) != str(expected["phimoe.digest"]):
        pytest.skip("this NumPy draws other random numbers: make the file anew with golden.py")
    file = tiny.gguf_checkpoint(tmp_path / "model.gguf", "phimoe", "f32", seed=7)
    logits = expected["phimoe.logits"]
    with Engine(file, quantize="none", kv_dtype="f32", threads=2) as engine:
        got = engine.logits(golden.PROMPT)[-golden.NUM_ROWS :]
    assert np.abs(got - logits).max() <= 1e-5 * np.ptp(logits)
