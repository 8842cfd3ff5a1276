"""Distillation as a command: what it writes, refuses, and goes on with after being killed."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny

pytest.importorskip("torch")

from sources import source, source_of_kind
from students import EXACT, KINDS, check_result, distill, report_of, write_text

from tiered import Engine
from tiered.backend import open_backend
from tiered.config import EngineConfig
from tiered.distilling.pool import load_pool
from tiered.distilling.samples import read_samples, record
from tiered.distilling.target import dense_target
from tiered.distilling.training import evaluate, split
from tiered.formats import CheckpointError, open_checkpoint


@pytest.fixture
def text(tmp_path):
    return write_text(tmp_path)


@pytest.mark.parametrize("num_files", [1, 3])
@pytest.mark.parametrize("model_type", KINDS)
def test_fewer_experts(tiered, tmp_path, text, model_type, num_files):
    if num_files > 1 and model_type not in ("mixtral", "granitemoe"):
        pytest.skip("files are divided alike, whatever the model")
    before, after = source(tmp_path, model_type, num_files=num_files), tmp_path / "after"
    status, _, err = distill(tiered, before, after, text, "--experts", 4)
    assert status == 0 and "4 experts a layer" in err, err
    report = report_of(after)
    assert {int(layer) for layer in report["layers"]} == {
        layer for layer in range(2) if model_type != "glm4_moe" or layer
    }
    for layer in report["layers"].values():
        begun = layer["beginnings"][layer["beginning"]]
        assert begun == min(layer["beginnings"].values())
        assert layer["error"] <= begun and len(layer["epochs"]) == 2
    assert any(
        layer["error"] < layer["beginnings"][layer["beginning"]]
        for layer in report["layers"].values()
    )
    with open_checkpoint(after) as checkpoint:
        assert checkpoint.config.num_experts == 4
    assert not (tmp_path / "after.distilling").exists()
    check_result(before, after, [".experts.", ".router"])


@pytest.mark.parametrize("size", [None, 96])
@pytest.mark.parametrize("model_type", ["mixtral", "qwen2_moe"])
def test_one_feed_forward(tiered, tmp_path, text, model_type, size):
    before, after = source(tmp_path, model_type, num_files=2), tmp_path / "after"
    given = ["--ffn-size", size] if size else []
    status, _, err = distill(tiered, before, after, text, "--dense", *given)
    assert status == 0 and "neurons a layer" in err, err
    report = report_of(after)
    for layer in report["layers"].values():
        assert layer["error"] < layer["beginnings"]["concatenated"] < 1
    with open_checkpoint(after) as checkpoint:
        assert checkpoint.config.model_type == "llama" and not checkpoint.config.num_experts
        assert checkpoint.config.ffn_size == report["ffn_size"]
        assert report["ffn_size"] == (size or (128 if model_type == "mixtral" else 224))
    check_result(before, after, [".ffn.", "o_bias"])


def test_the_reported_error_is_that_of_what_was_written(tiered, tmp_path, text):
    before, after = source(tmp_path), tmp_path / "after"
    assert distill(tiered, before, after, text, "--experts", 4, "--max-tokens", 640)[0] == 0
    from tiered.quality.text import text_tokens

    with Engine(before, **EXACT) as engine:
        ids = text_tokens(engine.tokenizer, text, 640)
    folder = tmp_path / "samples"
    folder.mkdir()
    with open_checkpoint(before) as checkpoint:
        config = checkpoint.config
    record(
        lambda backend: Engine(before, backend=backend, quantize="none", threads=2),
        open_backend(EngineConfig(quantize="none", threads=2)), config, ids, folder, False,
        lambda *_: None,
    )  # fmt: skip
    report = report_of(after)
    with open_checkpoint(after) as checkpoint:
        for layer in range(2):
            apart = split(read_samples(folder, layer), "cpu")[1]
            error = evaluate(apart, load_pool(checkpoint, layer), checkpoint.config)
            assert error == pytest.approx(report["layers"][str(layer)]["error"], rel=1e-4)


def test_without_epochs_it_is_the_best_beginning(tiered, tmp_path, text):
    before, after = source(tmp_path), tmp_path / "after"
    assert distill(tiered, before, after, text, "--experts", 4, "--epochs", 0)[0] == 0
    for layer in report_of(after)["layers"].values():
        assert layer["epochs"] == [] and layer["error"] == min(layer["beginnings"].values())


def test_the_picture(tiered, tmp_path, text):
    pytest.importorskip("matplotlib")
    picture = tmp_path / "errors.png"
    before, after = source(tmp_path), tmp_path / "after"
    status, _, err = distill(tiered, before, after, text, "--experts", 4, "--plot", picture)
    assert status == 0, err
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


# --- stopped and gone on with ---

KILL = """
import os, signal, sys
from pathlib import Path
from tiered import cli
from tiered.distilling import distill as module
from tiered.weights import pieces

name, calls, left = sys.argv.pop(1), 0, int(sys.argv.pop(1))
owner = pieces if name == "write_tensors" else module
real = getattr(owner, name)

def killing(*arguments, **options):
    global left
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    left -= 1
    return real(*arguments, **options)

setattr(owner, name, killing)
cli.main(sys.argv[1:])
"""


@pytest.mark.parametrize(
    ("where", "after_calls"),
    [("record", 0), ("write_layer", 0), ("write_layer", 1), ("write_tensors", 0)],
)
def test_a_killed_one_goes_on(tiered, tmp_path, text, where, after_calls):
    before, after = source(tmp_path), tmp_path / "after"
    command = [
        "distill", before, after, "--text", text, "--threads", 1, "--epochs", 2, "--experts", 4,
        "--max-tokens", 640,
    ]  # fmt: skip
    arguments = [str(a) for a in (where, after_calls, *command)]
    root = Path(__file__).parent.parent
    killed = subprocess.run(
        [sys.executable, "-c", KILL, *arguments], cwd=root, capture_output=True, timeout=300,
        env=os.environ | {"PYTHONPATH": str(root)},
    )  # fmt: skip
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not after.exists()
    for left in tmp_path.iterdir():
        if left.is_dir() and left != before:
            with pytest.raises((CheckpointError, OSError)):
                open_checkpoint(left)
    done = sorted((tmp_path / "after.distilling" / "layers").glob("*.safetensors"))
    assert len(done) == {"record": 0, "write_layer": after_calls, "write_tensors": 2}[where]
    times = [file.stat().st_mtime_ns for file in done]
    status, _, err = tiered(*command, "--seed", 5)
    assert status == 1 and "another recipe" in err
    assert [file.stat().st_mtime_ns for file in done] == times
    status, _, err = tiered(*command)
    assert status == 0, err
    assert not (tmp_path / "after.distilling").exists()
    command[2] = tmp_path / "straight"
    assert tiered(*command)[0] == 0
    name = "model.safetensors"
    assert (after / name).read_bytes() == (tmp_path / "straight" / name).read_bytes()


# --- what cannot be ---


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        ("gguf", ["--experts", 4], "no Hugging Face folder"),
        ("store", ["--experts", 4], "no Hugging Face folder"),
        ("llama", ["--experts", 4], "dense"),
        ("llama", ["--dense"], "dense"),
        ("mixtral", ["--experts", 1], "2 to 7"),
        ("mixtral", ["--experts", 8], "2 to 7"),
        ("mixtral", [], "either --experts N or --dense"),
        ("mixtral", ["--experts", 4, "--dense"], "either --experts N or --dense"),
        ("mixtral", ["--experts", 4, "--ffn-size", 64], "belongs to --dense"),
        ("mixtral", ["--dense", "--ffn-size", 100_000], "more than all experts"),
        ("mixtral", ["--experts", 4, "--device", "sim"], "leave --device out"),
        ("mixtral", ["--experts", 4, "--train-on", "abacus"], "--train-on abacus"),
        ("mixtral", ["--experts", 4, "--text", "/no/such/text"], "/no/such/text"),
        ("mixtral", ["--experts", 4, "--max-tokens", 100], "at least 512"),
        ("mixtral", ["--experts", 4, "--plot", "picture.doc"], "picture.doc"),
        ("olmoe", ["--dense"], "no dense architecture"),
        ("gpt_oss", ["--experts", 4], "activation and expert biases"),
        ("llama4_text", ["--experts", 4], "weighted inputs"),
        ("gemma4_text", ["--experts", 4], "output norms"),
        ("phimoe", ["--experts", 4], "router scoring"),
        ("nothing", ["--experts", 4], "no such file"),
    ],
    ids=str,
)
def test_mistakes_get_one_line(tiered, tmp_path, text, kind, arguments, message):
    model = source_of_kind(tmp_path, kind)
    before = sorted(tmp_path.iterdir())
    status, _, err = tiered("distill", model, tmp_path / "after", "--text", text, *arguments)
    assert status != 0 and message in err and "Traceback" not in err
    assert sorted(tmp_path.iterdir()) == before


def test_what_is_there_is_not_overwritten(tiered, tmp_path, text):
    before = source(tmp_path)
    for given in (["--experts", 4], ["--dense"]):
        status, _, err = tiered("distill", before, before, "--text", text, *given)
        assert status == 1 and "exists already" in err


def test_quantized_checkpoints_are_refused(tiered, tmp_path, text):
    before = source(tmp_path)
    values = json.loads((before / "config.json").read_text())
    values["quantization_config"] = {"quant_method": "mxfp4"}
    (before / "config.json").write_text(json.dumps(values))
    status, _, err = tiered("distill", before, tmp_path / "after", "--text", text, "--dense")
    assert status == 1 and "quantized" in err and len(err.strip().splitlines()) == 1


def test_a_full_disk_is_said_before_anything_is_written(tiered, tmp_path, text, monkeypatch):
    import shutil

    before = source(tmp_path)
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    for given in (["--experts", 4], ["--dense"]):
        status, _, err = tiered("distill", before, tmp_path / "after", "--text", text, *given)
        assert status == 1 and "bytes are needed" in err
    assert sorted(tmp_path.iterdir()) == [before, text]


def test_a_missing_torch_names_the_extra(tiered, tmp_path, text, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    before = source(tmp_path)
    status, _, err = tiered("distill", before, tmp_path / "after", "--text", text, "--dense")
    assert status != 0 and "tiered[distill]" in err and "Traceback" not in err


def test_dense_layers_keep_their_width(tiered, tmp_path, text):
    """Of a model whose first layer has no experts, all become as wide as that one."""
    before = source(tmp_path, "qwen2_moe")
    tensors = {w.hf: w.values for w in tiny.weights("qwen2_moe")}
    size, hidden = tiny.SIZES["ffn_size"], tiny.SIZES["hidden"]
    tensors = {n: v for n, v in tensors.items() if not n.startswith("model.layers.0.mlp.")}
    random = np.random.default_rng(0)
    for part, shape in {
        "gate": (size, hidden),
        "up": (size, hidden),
        "down": (hidden, size),
    }.items():
        values = random.standard_normal(shape, np.float32) / 8
        tensors[f"model.layers.0.mlp.{part}_proj.weight"] = values
    tiny.write_safetensors(before / "model.safetensors", tensors)
    values = json.loads((before / "config.json").read_text()) | {"mlp_only_layers": [0]}
    (before / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=f"--ffn-size {size}"):
        dense_target(before, tmp_path / "after", 64)
    status, _, err = distill(tiered, before, tmp_path / "after", text, "--dense")
    assert status == 0, err
    assert list(report_of(tmp_path / "after")["layers"]) == ["1"]
    check_result(before, tmp_path / "after", ["layers.1.ffn.", "o_bias"])
