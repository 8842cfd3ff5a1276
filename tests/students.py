"""What the tests of distillation share: a text, the command and what it must leave."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from tiered import Engine
from tiered.formats import open_checkpoint

EXACT = dict(threads=2, quantize="none", kv_dtype="f32")
KINDS = ["mixtral", "olmoe", "qwen2_moe", "qwen3_moe", "granitemoe", "glm4_moe"]
IDS = np.random.default_rng(0).integers(3, 300, 640).tolist()
WORDS = ["the", "rain", "in", "the", "north", "and", "then", "heat", "of", "an", "inner", "thing"]


def write_text(tmp_path):
    random = np.random.default_rng(1)
    file = tmp_path / "text.txt"
    file.write_text(" ".join(random.choice(WORDS, 400)))
    return file


def distill(tiered, before, after, text, *arguments):
    return tiered(
        "distill", before, after, "--text", text, "--threads", 2, "--epochs", 2, "--batch", 64,
        "--json", Path(after).with_suffix(".json"), *arguments,
    )  # fmt: skip


def report_of(after):
    return json.loads(Path(after).with_suffix(".json").read_text())


def check_result(before, after, replaced):
    """It opens; what was not trained keeps its bytes; transformers says what we say."""
    with open_checkpoint(before) as old, open_checkpoint(after) as new:
        for name in new.tensors:
            if not any(part in name for part in replaced):
                assert np.array_equal(new.data(name), old.data(name)), name
        trained = [n for n in new.tensors if any(part in n for part in replaced)]
        assert trained and all(np.isfinite(new.float32(name)).all() for name in trained)
    transformers = pytest.importorskip("transformers")
    reference = transformers.AutoModelForCausalLM.from_pretrained(after, dtype=torch.float32)
    with torch.no_grad():
        expected = reference(torch.tensor([IDS[:70]])).logits[0].numpy()
    with Engine(after, **EXACT) as engine:
        got = engine.logits(IDS[:70])
    assert np.abs(got - expected).max() <= 1e-4 * np.ptp(expected)
