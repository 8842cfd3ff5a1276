"""The example scripts, each run as a user would run it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tiered.demo import random_tiny_model

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny model with a vocabulary and, for the chat, a template."""
    folder = random_tiny_model(tmp_path_factory.mktemp("example") / "tiny")
    file = folder / "tokenizer_config.json"
    config = json.loads(file.read_text()) if file.exists() else {}
    config["chat_template"] = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    file.write_text(json.dumps(config))
    return folder


def run(name, *arguments):
    done = subprocess.run(
        [sys.executable, "-W", "error", ROOT / "examples" / name, *map(str, arguments)],
        capture_output=True, text=True, timeout=300, cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_laptop(model):
    lines = run("laptop_8gb.py").splitlines()
    assert [line.split()[0] for line in lines] == [
        "olmoe-1b-7b", "gpt-oss-20b", "qwen3-30b-a3b", "simulated,",
    ]  # fmt: skip
    out = run("laptop_8gb.py", "--model", model, "--max-new-tokens", 4, "hello")
    assert "tokens/s, hit rate" in out and "; forecast" in out


def test_mixtral():
    lines = run("mixtral_16gb.py").splitlines()
    speeds = [float(line.split()[2]) for line in lines[1:-1]]
    assert len(speeds) == 3 and speeds == sorted(speeds)


@pytest.mark.parametrize(("device", "how"), [("sim:t4", "simulated"), ("sim", "measured")])
def test_mixtral_on_a_device(model, device, how):
    if device == "sim":
        pytest.importorskip("torch")
    arguments = "--device", device, "--vram", "2G", "--ram", "4G", "--tokens", 8
    assert f" {how} (" in run("mixtral_16gb.py", "--model", model, *arguments)


def test_budgets(model):
    lines = run("budgets.py", model).splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["100%", "60%", "40%"]
    rates = [float(line.split()[2].rstrip("%")) for line in lines[1:]]
    assert rates[0] > rates[1] > rates[2] > 0


def test_own_policy(model):
    out = run("own_policy.py", model)
    assert "lru" in out and "%" in out


def test_transformers_experts(model):
    pytest.importorskip("torch")
    pytest.importorskip("transformers", minversion="5.8")
    out = run("transformers_experts.py", model, "hello", "--expert-ram", "1M")
    assert "hit rate" in out
