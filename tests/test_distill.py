"""Distillation: students say what their teachers said, and what was stopped goes on."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny

pytest.importorskip("torch")

import torch

from tiered import Engine
from tiered.backend import open_backend
from tiered.config import EngineConfig
from tiered.distilling.beginnings import concatenated, join, merged, pools
from tiered.distilling.decoder import Decoder
from tiered.distilling.logits import choose_texts
from tiered.distilling.pool import Pool, feed_forward, load_pool, load_shared, run_pool
from tiered.distilling.samples import Recorder, Samples, held_out, read_samples, record
from tiered.distilling.stored import layer_tensors, read_pool, write_layer
from tiered.distilling.target import dense_target, experts_target
from tiered.distilling.training import Recipe, evaluate, split, train
from tiered.formats import CheckpointError, open_checkpoint
from tiered.weights.convert import convert

EXACT = dict(threads=2, quantize="none", kv_dtype="f32")
KINDS = ["mixtral", "olmoe", "qwen2_moe", "qwen3_moe", "granitemoe", "glm4_moe"]
NO_GROUPS = {"n_group": 1, "topk_group": 1}
IDS = np.random.default_rng(0).integers(3, 300, 640).tolist()
RECIPE = Recipe(epochs=3, batch=64, learning_rate=1e-3, seed=0)
WORDS = ["the", "rain", "in", "the", "north", "and", "then", "heat", "of", "an", "inner", "thing"]


def source(folder, model_type="mixtral", **options):
    config = NO_GROUPS if model_type == "glm4_moe" else {}
    return tiny.hf_checkpoint(
        folder / "source", model_type, tokenizer=True, config=config, **options
    )


@pytest.fixture
def text(tmp_path):
    random = np.random.default_rng(1)
    file = tmp_path / "text.txt"
    file.write_text(" ".join(random.choice(WORDS, 400)))
    return file


def listen(model, folder, shared=False):
    """Samples of all layers in `folder`, and scores."""
    folder.mkdir()
    with open_checkpoint(model) as checkpoint:
        config = checkpoint.config
    return record(
        lambda backend: Engine(model, backend=backend, **EXACT),
        open_backend(EngineConfig(**EXACT)), config, IDS, folder, shared, lambda *_: None,
    )  # fmt: skip


def check_close(got, expected):
    """But for the order of sums of some dozen float32."""
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


# --- what the teacher says ---


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("model_type", KINDS)
def test_the_pool_says_what_the_kernels_say(tmp_path, model_type, shared):
    model = source(tmp_path, model_type)
    listen(model, tmp_path / "samples", shared)
    with open_checkpoint(model) as checkpoint:
        for layer in checkpoint.config.sparse_layers:
            samples = read_samples(tmp_path / "samples", layer)
            h = torch.from_numpy(samples.inputs)
            said = run_pool(h, load_pool(checkpoint, layer), checkpoint.config)
            always = load_shared(checkpoint, layer)
            if shared and always is not None:
                gate, up, down, scale = always
                said += feed_forward(h, gate, up, down) * (
                    1 if scale is None else (h @ scale.T).sigmoid()
                )
            expected = samples.outputs
            assert np.abs(said.numpy() - expected).max() <= 1e-5 * np.ptp(expected)
            assert (samples.energy > 0).all()


@pytest.mark.parametrize("shared", [False, True])
def test_listening_changes_nothing(tmp_path, shared):
    """And the energy is that of the hidden state after the layer, shared expert or not."""
    model, states = source(tmp_path, "qwen2_moe"), []
    with open_checkpoint(model) as checkpoint:
        config = checkpoint.config
    plain = open_backend(EngineConfig(**EXACT))
    recorder = Recorder(open_backend(EngineConfig(**EXACT)), config, tmp_path, 200, shared)
    for backend in (plain, recorder):
        with Engine(model, backend=backend, **EXACT) as engine:
            batch = engine.kv.batch([(engine.open_sequence(), IDS[:200])])
            states.append(engine.decoder.hidden(batch, engine.kv.pages).copy())
    assert np.array_equal(*states)
    energy = recorder.rows[1][:, -1]
    if shared:
        assert energy == pytest.approx(np.square(states[0]).sum(axis=1), rel=1e-5)
    else:  # without what the shared expert adds
        assert (energy > 0).all()


def test_an_eighth_is_held_out():
    apart = held_out(1024)
    assert apart.sum() == 128 and not apart[:448].any() and apart[448:512].all()


# --- beginnings ---


def alike(num_experts, config, seed=0):
    """A pool of experts that are all the same."""
    random = torch.Generator().manual_seed(seed)
    one = [torch.randn(1, 32, 16, generator=random), torch.randn(1, 32, 16, generator=random)]
    one.append(torch.randn(1, 16, 32, generator=random))
    router = torch.randn(num_experts, 16, generator=random)
    return Pool(*(part.repeat(num_experts, 1, 1) for part in one), router)


@pytest.fixture
def config(tmp_path):
    with open_checkpoint(source(tmp_path)) as checkpoint:
        return replace(checkpoint.config, num_experts=4, hidden_size=16, expert_size=32)


@pytest.mark.parametrize("size", [32, 40])
def test_experts_that_are_the_same_are_one_feed_forward(config, size):
    teacher, h = alike(4, config), torch.randn(200, 16)
    student = concatenated(teacher, None, h, config, size)
    assert student.gate.shape == (1, size, 16) and student.router is None
    check_close(run_pool(h, student, config), run_pool(h, teacher, config))


def test_a_shared_expert_is_part_of_the_feed_forward(config):
    teacher, h = alike(4, config), torch.randn(200, 16)
    gate, up, down = alike(1, config, seed=1)[:3]
    shared = gate[0], up[0], down[0], None
    student = concatenated(teacher, shared, h, config, 64)
    expected = run_pool(h, teacher, config) + feed_forward(h, gate[0], up[0], down[0])
    check_close(run_pool(h, student, config), expected)


def test_join_keeps_the_neurons_that_add_the_most():
    """Against plain sums, one neuron at a time; neurons 3 and 7 are the same."""
    random = np.random.default_rng(0)
    gate, up, down = random.standard_normal((3, 10, 6)).astype(np.float32)
    for part in (gate, up, down):
        part[7] = part[3]
    h = random.standard_normal((50, 6)).astype(np.float32)
    weights = random.random((50, 10)).astype(np.float32)
    heard = random.random(50).astype(np.float32)
    added, scales = np.zeros(10), np.ones(10)
    for n in range(10):
        z = h @ gate[n]
        active = z / (1 + np.exp(-z)) * (h @ up[n])
        was = active * (weights[:, 3] + weights[:, 7] if n == 3 else weights[:, n])
        will = active * heard
        added[n] = (was**2).sum() * (down[n] ** 2).sum()
        scales[n] = was @ will / (will @ will)
    added[7] = 0  # all of it counts for the first of the two
    kept = np.sort(np.argsort(-added)[:5])
    got = join(*map(torch.from_numpy, (h, gate, up, down, weights, heard)), 5)
    assert np.array_equal(got[0].numpy(), gate[kept])
    assert np.array_equal(got[1].numpy(), up[kept])
    assert got[2].numpy() == pytest.approx((down[kept] * scales[kept, None]).T, rel=1e-4)


def test_merged_experts_are_made_of_those_that_join_them(config):
    parts = [alike(1, config, seed) for seed in range(4)]
    teacher = Pool(*(torch.cat(matrices) for matrices in zip(*(p[:4] for p in parts), strict=True)))
    near = torch.tensor([0.99, 1.01]).repeat_interleave(16).reshape(2, 16)
    teacher = teacher._replace(
        router=torch.cat([teacher.router[:1] * near, teacher.router[1:2], -teacher.router[:1]])
    )
    student = merged(teacher, torch.randn(300, 16), config, [0, 3])  # 1 is most like 0
    rows = {row.numpy().tobytes() for expert in (0, 1) for row in teacher.gate[expert]}
    assert all(row.numpy().tobytes() in rows for row in student.gate[0])
    assert not torch.equal(student.gate[0], teacher.gate[0])
    alone = merged(teacher, torch.randn(300, 16), config, [0, 1, 2, 3])
    assert all(torch.equal(a, b) for a, b in zip(alone[:4], teacher[:4], strict=True))


def test_beginnings_are_the_criteria_and_a_merger(config):
    teacher, h = alike(4, config), torch.randn(64, 16)
    scores = {
        "frequency": np.array([[4.0, 3, 2, 1]]),
        "reap": np.array([[4.0, 3, 2, 1]]),  # the same again: not tried twice
        "loss": np.array([[1.0, 2, 3, 4]]),
    }
    found = dict(pools(teacher, h, config, scores, 0, 2))
    assert list(found) == ["frequency", "loss", "merged"]
    assert torch.equal(found["loss"].router, teacher.router[[2, 3]])


# --- training ---


def toy(config, num_tokens=1024):
    """Samples of a random teacher, in two parts, and beginnings of half its size."""
    random = torch.Generator().manual_seed(3)
    shapes = (4, 32, 16), (4, 32, 16), (4, 16, 32), (4, 16)
    teacher = Pool(*(torch.randn(shape, generator=random) / 4 for shape in shapes))
    h = torch.randn(num_tokens, 16, generator=random)
    said = run_pool(h, teacher, config)
    samples = Samples(h.numpy(), said.numpy(), np.ones(num_tokens, np.float32))
    return split(samples, "cpu"), [("first", teacher.take([0, 1])), ("last", teacher.take([2, 3]))]


def test_training_lowers_the_error_on_what_it_did_not_see(config):
    config = replace(config, num_experts=2)
    parts, beginnings = toy(replace(config, num_experts=4))
    got = train(iter(beginnings), parts, config, RECIPE, torch.float32, lambda _: None)
    assert got.beginning == min(got.beginnings, key=got.beginnings.get)
    assert got.error < 0.9 * got.beginnings[got.beginning]
    assert got.error == min(epoch.held_out for epoch in got.epochs)
    assert evaluate(parts[1], got.pool, config) == pytest.approx(got.error)


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_training_that_fails_leaves_the_beginning(config, kind):
    config = replace(config, num_experts=2)
    parts, beginnings = toy(replace(config, num_experts=4))
    recipe = RECIPE._replace(learning_rate=100.0, epochs=5)
    got = train(iter(beginnings), parts, config, recipe, kind, lambda _: None)
    begun = dict(beginnings)[got.beginning].rounded(kind)
    assert got.error == got.beginnings[got.beginning]
    assert all(torch.equal(a, b) for a, b in zip(got.pool[:4], begun[:4], strict=True))
    assert len(got.epochs) == 2  # it was stopped early


def test_training_is_repeatable(config):
    config = replace(config, num_experts=2)
    results = []
    for seed in (0, 0, 1):
        parts, beginnings = toy(replace(config, num_experts=4))
        recipe = RECIPE._replace(seed=seed)
        results.append(train(iter(beginnings), parts, config, recipe, torch.float32, lambda _: 0))
    assert torch.equal(results[0].pool.gate, results[1].pool.gate)
    assert not torch.equal(results[0].pool.gate, results[2].pool.gate)


@pytest.mark.parametrize("model_type", KINDS)
def test_what_is_stored_comes_back(tmp_path, model_type):
    model = source(tmp_path, model_type)
    target = experts_target(model, tmp_path / "after", 4)
    with open_checkpoint(model) as checkpoint:
        layer = target.layers[0]
        pool = load_pool(checkpoint, layer).take([1, 3, 4, 6])
        file = tmp_path / "layer"
        write_layer(file, layer_tensors(checkpoint, target, layer, pool), {})
        back = read_pool(checkpoint, target, layer, file)
    for ours, theirs in zip(back, pool, strict=True):
        assert (ours is None) == (theirs is None)
        assert ours is None or torch.equal(ours, theirs)


# --- the command ---


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
    model = tmp_path / "nothing"
    if kind == "gguf":
        model = tiny.gguf_checkpoint(tmp_path / "tiny.gguf")
    elif kind == "store":
        model = convert(source(tmp_path), tmp_path / "store")
    elif kind != "nothing":
        model = source(tmp_path, kind)
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


# --- by logits ---


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
