"""Distillation by logits: our decoder, and training that goes on where it was stopped."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")

import torch
from sources import source
from students import EXACT, IDS, check_result, distill, report_of, write_text

from tiered import Engine
from tiered.distilling.decoder import Decoder
from tiered.distilling.logits import choose_texts
from tiered.distilling.pool import load_pool
from tiered.formats import open_checkpoint


@pytest.fixture
def text(tmp_path):
    return write_text(tmp_path)


@pytest.mark.parametrize("model_type", ["mixtral", "olmoe", "qwen2_moe", "qwen3_moe", "granitemoe"])
def test_the_decoder_says_what_the_engine_says(tmp_path, model_type):
    model = source(tmp_path, model_type)
    with open_checkpoint(model) as checkpoint:
        config = checkpoint.config
        pools = {layer: load_pool(checkpoint, layer) for layer in config.sparse_layers}
        with torch.no_grad():
            tokens = torch.tensor(IDS[:200])
            got = Decoder(checkpoint, is_dense=False).logits(tokens, pools, config).numpy()
    with Engine(model, **EXACT) as engine:
        expected = engine.logits(IDS[:200])
    assert np.abs(got - expected).max() <= 1e-4 * np.ptp(expected)


def test_the_decoder_sees_no_further_than_its_window(tmp_path):
    model = source(tmp_path)
    values = json.loads((model / "config.json").read_text()) | {"sliding_window": 24}
    (model / "config.json").write_text(json.dumps(values))
    with open_checkpoint(model) as checkpoint, Engine(model, **EXACT) as engine:
        pools = {layer: load_pool(checkpoint, layer) for layer in range(2)}
        with torch.no_grad():
            tokens = torch.tensor(IDS[:100])
            got = Decoder(checkpoint, False).logits(tokens, pools, checkpoint.config).numpy()
        expected = engine.logits(IDS[:100])
    assert np.abs(got - expected).max() <= 1e-4 * np.ptp(expected)


def test_texts_are_apart():
    texts = choose_texts(64 * 256 + 100, 4096, steps=20, seed=0)
    assert texts.length == 256 and len(texts.training) == 20 and len(texts.apart) == 8
    assert len(set(texts.all)) == 28
    assert choose_texts(64 * 256, 4096, 1000, 0).training != sorted(texts.training)
    with pytest.raises(ValueError, match="at least 2048"):
        choose_texts(2047, 4096, 1, 0)


def test_training_by_logits_goes_on_where_it_was_stopped(tiered, tmp_path, text):
    text.write_text(" ".join([text.read_text()] * 3))
    before, after = source(tmp_path), tmp_path / "after"
    command = [
        "distill", before, after, "--text", text, "--threads", 1, "--epochs", 1, "--experts", 4,
        "--context", 64, "--logits-steps", 16, "--logits-learning-rate", 1e-3, "--json",
        tmp_path / "after.json",
    ]  # fmt: skip
    root = Path(__file__).parent.parent
    killed = subprocess.run(
        [sys.executable, "-c", KILL_KEEPING, *map(str, command)], cwd=root, capture_output=True,
        timeout=300, env=os.environ | {"PYTHONPATH": str(root)},
    )  # fmt: skip
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert (tmp_path / "after.distilling" / "logits" / "state.pt").exists()
    status, _, err = tiered(*command)
    assert status == 0 and "by logits" in err, err
    report = report_of(after)["logits"]
    assert report["steps"][0] == 0 and report["steps"][-1] == 16
    assert report["after"] == min(report["held_out"]) < report["before"]
    command[2] = tmp_path / "straight"
    assert tiered(*command)[0] == 0
    assert report_of(after)["logits"] == report  # of the other one, in the same file
    name = "model.safetensors"
    assert (after / name).read_bytes() == (tmp_path / "straight" / name).read_bytes()
    check_result(before, after, [".experts.", ".router"])


KILL_KEEPING = """
import os, signal, sys
from tiered import cli
from tiered.distilling.logits import LogitsTraining

real = LogitsTraining._keep

def killing(self, step, optimizer):
    if step >= 8:
        os.kill(os.getpid(), signal.SIGKILL)
    real(self, step, optimizer)

LogitsTraining._keep = killing
cli.main(sys.argv[1:])
"""


def test_a_dense_student_is_trained_by_logits(tiered, tmp_path, text):
    text.write_text(" ".join([text.read_text()] * 3))
    before, after = source(tmp_path, "qwen2_moe"), tmp_path / "after"
    status, _, err = distill(
        tiered, before, after, text, "--dense", "--logits-steps", 8, "--context", 64,
        "--logits-learning-rate", 3e-4, "--epochs", 0,
    )  # fmt: skip
    assert status == 0, err
    report = report_of(after)["logits"]
    assert report["after"] < report["before"]
    check_result(before, after, [".ffn.", "o_bias"])


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        ("deepseek_v2", ["--experts", 4], "its latent"),
        ("mixtral", ["--experts", 4, "--max-tokens", 1000], "--logits-steps needs at least"),
    ],
)
def test_what_cannot_be_trained_by_logits(tiered, tmp_path, text, kind, arguments, message):
    before = source(tmp_path, kind)
    status, _, err = tiered(
        "distill", before, tmp_path / "after", "--text", text, "--logits-steps", 5, *arguments
    )
    assert status == 1 and message in err and "Traceback" not in err
    assert sorted(tmp_path.iterdir()) == [before, text]
