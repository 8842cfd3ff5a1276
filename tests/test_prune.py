"""Pruning: the best experts stay as they were, and nothing half-written ever opens."""

import json
import shutil

import golden
import numpy as np
import pytest
import tiny
from sources import source, source_of_kind

from tiered import Engine
from tiered.backend import open_backend
from tiered.config import EngineConfig
from tiered.formats import CheckpointError, open_checkpoint
from tiered.quality.importance import (
    CRITERIA,
    Meter,
    best_experts,
    leave_one_out,
    random_scores,
)
from tiered.quality.layer_tap import read
from tiered.tracing.trace import Routed, read_trace
from tiered.weights.prune import prune

IDS = np.random.default_rng(0).integers(3, 300, 70).tolist()
KEPT = {0: [0, 3, 4, 7], 1: [1, 2, 5, 6]}
SPARSE = [name for name in tiny.ARCHITECTURES if name != "llama"]
CUT = {"router", "router_bias", "router_correction", "router_scales"}


def check_tensors(before, after, kept):
    """Every tensor of `after` is the one of `before` that it should be."""
    with open_checkpoint(before) as old, open_checkpoint(after) as new:
        assert new.config.num_experts == len(kept[0]) and new.config.top_k == old.config.top_k
        for name in new.tensors:
            parts = name.split(".")
            if "experts" in parts:
                parts[3] = str(kept[int(parts[1])][int(parts[3])])
                assert np.array_equal(new.data(name), old.data(".".join(parts)))
            elif parts[-1] in CUT or "experts_bias" in parts:
                expected = old.float32(name)[kept[int(parts[1])]]
                assert np.array_equal(new.float32(name), expected)
            else:
                assert np.array_equal(new.data(name), old.data(name))
        assert {n for n in old.tensors if ".experts." not in n} == {
            n for n in new.tensors if ".experts." not in n
        }


@pytest.mark.parametrize("num_files", [1, 3])
@pytest.mark.parametrize("model_type", SPARSE)
def test_what_stays_keeps_its_bytes(tmp_path, model_type, num_files):
    before = source(tmp_path, model_type, num_files=num_files)
    calls = []
    after = prune(before, tmp_path / "after", KEPT, lambda *call: calls.append(call))
    assert calls[-1][0] == calls[-1][1]
    check_tensors(before, after, KEPT)
    assert (after / "model.safetensors.index.json").exists() == (num_files > 1)
    with Engine(after, threads=2) as engine:
        assert engine.tokenizer.encode("the rain") and np.isfinite(engine.logits(IDS)).all()


def fuse(folder):
    """The same experts as transformers keeps them in memory: one tensor for all of a layer."""
    tensors = {w.hf: w.values for w in tiny.weights("olmoe")}
    for layer in range(2):
        prefix = f"model.layers.{layer}.mlp.experts."
        gate, up, down = (
            np.stack([tensors.pop(f"{prefix}{e}.{name}_proj.weight") for e in range(8)])
            for name in ("gate", "up", "down")
        )
        tensors[prefix + "gate_up_proj"] = np.concatenate([gate, up], axis=1)
        tensors[prefix + "down_proj"] = down
    tiny.write_safetensors(folder / "model.safetensors", tensors)


def test_fused_experts(tmp_path):
    before = source(tmp_path, "olmoe")
    fuse(before)
    check_tensors(before, prune(before, tmp_path / "after", KEPT), KEPT)


@pytest.mark.parametrize("model_type", SPARSE)
def test_transformers_opens_it(tmp_path, model_type):
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    sizes = golden.SIZES.get(model_type, {})
    after = prune(source(tmp_path, model_type, dtype="f32", **sizes), tmp_path / "after", KEPT)
    with Engine(after, quantize="none", kv_dtype="f32", threads=2) as engine:
        got = engine.logits(IDS)
    with torch.no_grad():
        expected = golden.reference(after)(torch.tensor([IDS])).logits[0].numpy()
    assert np.abs(got - expected).max() <= 1e-5 * np.ptp(expected)


# --- importance ---


def metered(model, **choices):
    choices = dict(threads=2, quantize="none", kv_dtype="f32", **choices)
    with open_checkpoint(model) as checkpoint:
        config = checkpoint.config
    return Engine(model, backend=Meter(open_backend(EngineConfig(**choices)), config), **choices)


def test_a_metered_engine_says_the_same(tmp_path):
    model = source(tmp_path)
    with metered(model) as engine, Engine(model, threads=2, quantize="none", kv_dtype="f32") as e:
        assert np.array_equal(engine.logits(IDS), e.logits(IDS))


@pytest.mark.parametrize("model_type", ["mixtral", "olmoe"])
def test_importance_is_what_the_trace_and_plain_sums_say(tmp_path, model_type, monkeypatch):
    outputs = []  # of every layer's experts, [num_tokens, top_k, hidden_size]
    hear = Meter.hear

    def keep(meter, heard):
        outputs.append(heard.out.copy())
        hear(meter, heard)

    monkeypatch.setattr(Meter, "hear", keep)
    model, file = source(tmp_path, model_type), tmp_path / "trace"
    with metered(model) as engine, engine.record(file):
        read(engine, IDS, lambda done, total: None)
        scores = {name: criterion(engine.backend) for name, criterion in CRITERIA.items()}
    routings = [e.routing for e in read_trace(file).events if isinstance(e, Routed)]
    assert len(routings) == len(outputs) == 2
    for layer, (routing, out) in enumerate(zip(routings, outputs, strict=True)):
        for expert in range(8):
            tokens, ranks = np.nonzero(routing.experts == expert)
            assert scores["frequency"][layer, expert] == len(tokens)
            norms = routing.weights[tokens, ranks] * np.linalg.norm(out[tokens, ranks], axis=1)
            mean = norms.mean() if len(norms) else 0.0
            assert scores["reap"][layer, expert] == pytest.approx(mean, rel=2e-3)
        moved = leave_one_out(out, routing.weights, model_type == "mixtral")
        sums = np.bincount(routing.experts.ravel(), moved.ravel(), minlength=8)
        assert scores["loss"][layer] == pytest.approx(sums, rel=2e-2)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_leave_one_out(top_k, normalize):
    random = np.random.default_rng(top_k)
    out = random.standard_normal((5, top_k, 7)).astype(np.float32)
    weights = random.random((5, top_k)).astype(np.float32)
    weights /= weights.sum(axis=1, keepdims=True) if normalize else 2
    got = leave_one_out(out, weights, normalize)
    for token in range(5):
        whole = weights[token] @ out[token]
        for rank in range(top_k):
            others = np.delete(weights[token], rank)
            if normalize and top_k > 1:
                others = others / others.sum()
            left = others @ np.delete(out[token], rank, axis=0)
            expected = ((whole - left) ** 2).sum()
            assert got[token, rank] == pytest.approx(expected, rel=1e-4)


def test_the_best_stay():
    scores = np.array([[3.0, 1.0, 2.0, 3.0], [0.0, 0.0, 0.0, 1.0]])
    assert best_experts(scores, [0, 1], 2) == {0: [0, 3], 1: [0, 3]}
    assert best_experts(scores, [1], 3) == {1: [0, 1, 3]}


def test_random_is_repeatable(tmp_path):
    with open_checkpoint(source(tmp_path)) as checkpoint:
        a, b, c = (random_scores(checkpoint.config, seed) for seed in (1, 1, 2))
    assert np.array_equal(a, b) and not np.array_equal(a, c)


# --- nothing half-written, nothing that cannot work ---


def test_an_interrupted_one_leaves_nothing(tmp_path):
    def stop(done, total):
        raise KeyboardInterrupt

    before = source(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        prune(before, tmp_path / "after", KEPT, stop)
    assert list(tmp_path.iterdir()) == [before]


@pytest.mark.parametrize("steps", [1, 5, 20])
def test_a_killed_one_does_not_open(tmp_path, monkeypatch, steps):
    calls = []

    def stop(done, total):
        calls.append(done)
        if len(calls) == steps:
            raise KeyboardInterrupt

    before = source(tmp_path)
    monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)
    with pytest.raises(KeyboardInterrupt):
        prune(before, tmp_path / "after", KEPT, stop)
    (left,) = [path for path in tmp_path.iterdir() if path != before]
    assert not (tmp_path / "after").exists()
    with pytest.raises((CheckpointError, OSError)):
        open_checkpoint(left)


def test_a_full_disk_is_said_before_anything_is_written(tmp_path, monkeypatch):
    before = source(tmp_path)
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OSError, match="bytes are needed"):
        prune(before, tmp_path / "after", KEPT)
    assert list(tmp_path.iterdir()) == [before]


def test_a_tensor_without_a_rule_is_refused(tmp_path):
    before = source(tmp_path)
    tensors = {w.hf: w.values for w in tiny.weights("mixtral")}
    tensors["model.layers.0.block_sparse_moe.gate.bias"] = np.zeros(8, np.float32)
    tiny.write_safetensors(before / "model.safetensors", tensors)
    with pytest.raises(CheckpointError, match=r"gate\.bias"):
        prune(before, tmp_path / "after", KEPT)
    assert list(tmp_path.iterdir()) == [before]


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        ("gguf", ["--experts", 4], "no Hugging Face folder"),
        ("store", ["--experts", 4], "no Hugging Face folder"),
        ("llama", ["--experts", 4], "dense"),
        ("mixtral", ["--experts", 1], "2 to 7"),
        ("mixtral", ["--experts", 8], "2 to 7"),
        ("mixtral", ["--experts", 4], "needs a --text"),
        ("mixtral", ["--experts", 4, "--text", "/no/such/text"], "/no/such/text"),
        ("mixtral", ["--experts", 4, "--criterion", "taste"], "--criterion"),
        ("nothing", ["--experts", 4], "no such file"),
    ],
    ids=str,
)
def test_mistakes_get_one_line(tiered, tmp_path, kind, arguments, message):
    model = source_of_kind(tmp_path, kind)
    status, _, err = tiered("prune", model, tmp_path / "after", *arguments)
    assert status != 0 and message in err and "Traceback" not in err
    assert not (tmp_path / "after").exists()


def test_what_is_there_is_not_overwritten(tiered, tmp_path):
    before = source(tmp_path)
    status, _, err = tiered("prune", before, before, "--experts", 4, "--criterion", "random")
    assert status == 1 and "exists already" in err


@pytest.mark.parametrize("criterion", ["frequency", "reap", "loss", "random"])
def test_the_command(tiered, tmp_path, criterion):
    text, after = tmp_path / "text.txt", tmp_path / "after"
    text.write_text("the rain in the north, and then the heat " * 8)
    before = source(tmp_path)
    status, _, err = tiered(
        "prune", before, after, "--experts", 4, "--criterion", criterion, "--text", text,
        "--threads", 2, "--json", tmp_path / "out.json",
    )  # fmt: skip
    assert status == 0 and "4 of 8 experts" in err, err
    report = json.loads((tmp_path / "out.json").read_text())
    check_tensors(before, after, {int(layer): kept for layer, kept in report["kept"].items()})
    if criterion == "frequency":
        assert 0.5 <= report["routed_share"] <= 1
    status, out, err = tiered("compare", before, after, "--text", text, "--generate", 4, "--json",
                              "--threads", 2)  # fmt: skip
    assert status == 0, err
    assert json.loads(out)["kl_mean"] > 0 and "routing_agreement" not in json.loads(out)
