"""Quantizing whole models: what changes, what stays, and what was interrupted goes on."""

import json
import shutil

import numpy as np
import pytest
import tiny
from other_weights import logits_with

from cpu_kernels.formats import FORMATS
from tiered import Engine
from tiered.formats import CheckpointError, open_checkpoint
from tiered.quantizing.quantize import Recipe, quantize
from tiered.quantizing.rewritten import Rewritten
from tiered.quantizing.scaling import divide_inputs

IDS = np.random.default_rng(0).integers(3, 300, 600).tolist()
SPARSE = [name for name in tiny.ARCHITECTURES if name != "llama"]
HF_TO_GGUF = ["mixtral", "olmoe", "qwen2_moe", "qwen3_moe"]
FAST = dict(window=64, threads=2)


def source(folder, model_type="mixtral", **options):
    return tiny.hf_checkpoint(folder / "source", model_type, tokenizer=True, **options)


def check_rest(before, after, changed=()):
    """Routers, norms and embeddings as they were; large matrices in 8 bits."""
    with open_checkpoint(before) as old, open_checkpoint(after) as new:
        for name, tensor in old.tensors.items():
            if ".experts." in name or name.endswith(changed):
                continue
            if new.tensors[name].format != tensor.format:
                assert new.tensors[name].format == "q8_0"
            else:
                assert np.array_equal(new.data(name), old.data(name))


@pytest.mark.parametrize("method", ["rtn", "weighted", "gptq", "awq", "awq+gptq"])
@pytest.mark.parametrize("format", ["int4_g128", "nf4"])
def test_formats_that_gguf_lacks(format, method, tmp_path):
    sizes = dict(hidden=384, head_dim=64, expert_size=128, experts=4)
    before, after = source(tmp_path, "mixtral", **sizes), tmp_path / "after"
    result = quantize(before, after, Recipe(method=method, format=format, **FAST), IDS)
    assert result.bits == 4.25
    with Engine(before, quantize="none", threads=1) as exact, Engine(after, threads=1) as other:
        assert other.store.layout(0).down.format == format
        expected, got = exact.logits(IDS[:8]), other.logits(IDS[:8])
    assert 0 < np.median(np.abs(got - expected)) <= 0.05 * np.ptp(expected)


@pytest.mark.parametrize("format", ["int4_g128", "nf4"])
def test_gguf_is_told_apart(format, tmp_path):
    before = source(tmp_path, "mixtral", hidden=128, head_dim=32, expert_size=128)
    for recipe in (Recipe(method="rtn", format=format), Recipe(bits=4.3, formats=(format, "q4_0"))):
        with pytest.raises(ValueError, match=f"GGUF has no {format}; write a store instead"):
            quantize(before, tmp_path / "after.gguf", recipe, IDS)
    assert set(tmp_path.iterdir()) == {before}
    recipe = Recipe(method="weighted", bits=4.3, sensitivity_tokens=64, **FAST)
    for name, own in (("after.gguf", set()), ("after", {"int4_g128", "nf4"})):
        result = quantize(before, tmp_path / name, recipe, IDS)
        candidates = {option.format for options in result.options.values() for option in options}
        assert candidates & {"int4_g128", "nf4"} == own


@pytest.mark.parametrize("method", ["gptq", "awq", "rtn"])
@pytest.mark.parametrize("model_type", SPARSE)
def test_eight_bits_say_nearly_the_same(model_type, method, tmp_path):
    before, after = source(tmp_path, model_type), tmp_path / "after"
    result = quantize(before, after, Recipe(method=method, format="q8_0", **FAST), IDS)
    assert result.bits == 8.5 and set(tmp_path.iterdir()) == {before, after}
    if method != "awq":
        check_rest(before, after)
    with open_checkpoint(after) as checkpoint:
        layer = checkpoint.config.sparse_layers[0]
        assert checkpoint.tensors[f"layers.{layer}.experts.1.down"].format == "q8_0"
    with Engine(before, quantize="none", threads=1) as exact, Engine(after, threads=1) as other:
        expected, got = exact.logits(IDS[:8]), other.logits(IDS[:8])
    # Where two experts are equally good, a token may go the other way.
    assert np.median(np.abs(got - expected)) <= 0.02 * np.ptp(expected)


@pytest.mark.parametrize("model_type", ["mixtral", "qwen2_moe", "granitemoehybrid"])
def test_scaling_alone_changes_nothing(model_type, tmp_path):
    """Norm, router and shared expert make good for it: the rest of the arithmetic is the same."""
    before = source(tmp_path, model_type, dtype="f32")
    scale = np.exp(np.random.default_rng(0).standard_normal(64)).astype(np.float32)
    with Engine(before, quantize="none", threads=1) as engine:
        expected = engine.logits(IDS[:20])
    (tmp_path / "scratch").mkdir()
    with Engine(before, quantize="none", threads=1) as engine:
        changed = Rewritten(engine.checkpoint, tmp_path / "scratch")
        for layer in engine.config.sparse_layers:
            divide_inputs(changed, layer, scale)
            for expert in range(engine.config.num_experts):
                for part in ("gate", "up"):
                    name = f"layers.{layer}.experts.{expert}.{part}"
                    changed.rewrite(name, changed.float32(name) * scale)
        got = logits_with(engine, changed, IDS[:20])
    assert np.abs(got - expected).max() <= 1e-4 * np.ptp(expected)


@pytest.mark.parametrize("model_type", SPARSE)
def test_of_gguf_everything_else_stays(model_type, tmp_path):
    before = tiny.gguf_checkpoint(tmp_path / "before.gguf", model_type, "bf16")
    after = tmp_path / "after.gguf"
    quantize(before, after, Recipe(format="iq4_nl", **FAST), IDS)
    check_rest(before, after)
    with open_checkpoint(before) as old, open_checkpoint(after) as new:
        assert new.config == old.config
        assert {k for k in old.metadata if k not in new.metadata} <= {"general.file_type"}
        assert dict(new.tokenizer_source) == dict(old.tokenizer_source)
    with Engine(after, threads=1) as engine:
        assert engine.store.layout(engine.config.sparse_layers[0]).up.format == "iq4_nl"
        assert np.isfinite(engine.logits(IDS[:8])).all()


@pytest.mark.parametrize("model_type", HF_TO_GGUF)
def test_gguf_of_a_folder_is_the_same_model_as_its_store(model_type, tmp_path):
    before = source(tmp_path, model_type)
    for name in ("store", "model.gguf"):
        quantize(before, tmp_path / name, Recipe(format="q5_1", **FAST), IDS)
    text = "the rain 123 don't  \n 你好"
    with (
        Engine(tmp_path / "store", threads=1) as store,
        Engine(tmp_path / "model.gguf", threads=1) as file,
    ):
        ids = store.tokenizer.encode(text)
        assert file.tokenizer.encode(text) == ids and file.eos_ids == store.eos_ids
        expected, got = store.logits(IDS[:30]), file.logits(IDS[:30])
        assert np.abs(got - expected).max() <= 0.02 * np.ptp(expected)


def test_quantized_files_can_be_quantized_again(tmp_path):
    before = tiny.gguf_checkpoint(tmp_path / "before.gguf", "qwen3_moe", "q8_0")
    quantize(before, tmp_path / "after.gguf", Recipe(**FAST), IDS)
    with open_checkpoint(tmp_path / "after.gguf") as checkpoint:
        assert checkpoint.tensors["layers.0.experts.0.up"].format == "q4_0"
        assert checkpoint.tensors["layers.0.q"].format == "q8_0"


@pytest.mark.parametrize("bits", [4.5, 5.2, 7.0])
def test_a_size_is_kept(bits, tmp_path):
    before, after = source(tmp_path, "olmoe"), tmp_path / "after"
    recipe = Recipe(method="weighted", bits=bits, sensitivity_tokens=128, **FAST)
    result = quantize(before, after, recipe, IDS)
    assert bits - 0.9 < result.bits <= bits
    with open_checkpoint(after) as checkpoint:
        sizes = [t.nbytes for n, t in checkpoint.tensors.items() if ".experts." in n]
    assert 8 * sum(sizes) / (2 * 8 * 3 * 64 * 64) == pytest.approx(result.bits)
    # More bits never cost more.
    for options in result.options.values():
        by_bits = sorted(options, key=lambda o: FORMATS[o.format].bits)
        assert by_bits[0].loss > by_bits[-1].loss >= 0


def test_the_same_again(tmp_path):
    before = source(tmp_path)
    for name, threads in (("a.gguf", 1), ("b.gguf", 2)):
        quantize(before, tmp_path / name, Recipe(window=64, threads=threads), IDS)
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


# --- refusals, and nothing half-written ---


class Stop:
    """Interrupts at the `number`-th report of `what`; counts the layers that were begun."""

    def __init__(self, what="", number=0):
        self.what, self.number, self.layers = what, number, []

    def __call__(self, what, done, total):
        if what == "rounding" and done < total:
            self.layers.append(done)
        if what == self.what and done >= self.number:
            raise KeyboardInterrupt


@pytest.mark.parametrize(
    "name, method, what, number",
    [
        ("after", "gptq", "sensitivity", 1),
        ("after.gguf", "awq", "rounding", 2),
        ("after", "rtn", "rounding", 2),
        ("after.gguf", "gptq", "writing", 1),
        ("after", "gptq", "writing", 1),
    ],
)
def test_what_was_interrupted_goes_on(tmp_path, name, method, what, number):
    before, recipe = source(tmp_path, layers=3), Recipe(method=method, bits=5.5, **FAST)
    with pytest.raises(KeyboardInterrupt):
        quantize(before, tmp_path / name, recipe, IDS, Stop(what, number))
    assert {path.name for path in tmp_path.iterdir()} == {before.name, f".{name}.quantizing"}
    for file in (tmp_path / f".{name}.quantizing").glob("*.gguf"):
        with pytest.raises((CheckpointError, OSError)):
            open_checkpoint(file)
    rest = Stop()
    again = quantize(before, tmp_path / name, recipe, IDS, rest)
    assert rest.layers == {"sensitivity": [0, 1, 2], "rounding": [2], "writing": []}[what]
    whole = quantize(before, tmp_path / f"whole-{name}", recipe, IDS)
    assert set(path.name for path in tmp_path.iterdir()) == {before.name, name, f"whole-{name}"}
    assert again == whole
    with (
        open_checkpoint(tmp_path / name) as one,
        open_checkpoint(tmp_path / f"whole-{name}") as other,
    ):
        for tensor in one.tensors:
            assert np.array_equal(one.data(tensor), other.data(tensor)), tensor


def test_what_something_else_left_is_kept(tmp_path):
    before, after = source(tmp_path), tmp_path / "after"
    with pytest.raises(KeyboardInterrupt):
        quantize(before, after, Recipe(method="rtn"), IDS, Stop("rounding", 1))
    with pytest.raises(ValueError, match="begun with another format: give the same command"):
        quantize(before, after, Recipe(method="rtn", format="q5_0"), IDS)
    with pytest.raises(ValueError, match="begun with another text"):
        quantize(before, after, Recipe(method="rtn"), IDS[::-1])
    rest = Stop()
    quantize(before, after, Recipe(method="rtn", threads=2), IDS, rest)
    assert rest.layers == [1]


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("the rain in Spain stays mainly in the plain, 1234. " * 40, encoding="utf-8")
    return file


def test_the_command(tmp_path, text, tiered):
    before, report = source(tmp_path), tmp_path / "report.json"
    options = "--text", text, "--window", 64, "--json", report
    status, _, err = tiered("quantize", before, tmp_path / "after", *options)
    assert status == 0 and "4.5 bits per weight" in err, err
    facts = json.loads(report.read_text())
    assert facts["formats"]["0"] == ["q4_0"] * 3 and facts["tokens"] > 100
    assert facts["bytes"] == sum(
        f.stat().st_size for f in (tmp_path / "after").rglob("*") if f.is_file()
    )
    assert facts["few"] == 0 or "saw fewer than 128 tokens" in err


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "--method gptq needs a --text"),
        (["--method", "rtn", "--bits", "5"], "--bits needs a --text"),
        (["--method", "rtn", "--format", "q9_9"], "experts can become q2_k"),
        (["--method", "rtn", "--format", "q4_k"], "no whole number of q4_k blocks"),
        (["--text", "TEXT", "--bits", "2"], "--bits 2 cannot be reached"),
        (["--text", "TEXT", "--bits", "6", "--formats", "q4_0"], "have 4.5 to 4.5 bits"),
        (["--text", "TEXT", "--max-tokens", "20"], "has 20 tokens; for 8 experts"),
    ],
)
def test_what_cannot_be_is_refused(arguments, message, tmp_path, text, tiered):
    before = source(tmp_path)
    arguments = [text if argument == "TEXT" else argument for argument in arguments]
    status, _, err = tiered("quantize", before, tmp_path / "after", *arguments)
    assert status != 0 and message in err and "Traceback" not in err, err
    assert not (tmp_path / "after").exists() and not list(tmp_path.glob(".after*"))


def test_other_refusals(tmp_path, monkeypatch):
    before = source(tmp_path)
    (tmp_path / "there").mkdir()
    with pytest.raises(FileExistsError, match="exists already"):
        quantize(before, tmp_path / "there", Recipe(method="rtn"))
    dense = tiny.hf_checkpoint(tmp_path / "dense", "llama")
    with pytest.raises(ValueError, match="dense model"):
        quantize(dense, tmp_path / "after", Recipe(method="rtn"))
    other = tiny.hf_checkpoint(tmp_path / "other", "lfm2_moe")
    with pytest.raises(ValueError, match="write a store instead"):
        quantize(other, tmp_path / "after.gguf", Recipe(method="rtn"))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(OSError, match="only 1000 are free"):
        quantize(before, tmp_path / "after", Recipe(method="rtn"))
    assert not list(tmp_path.glob(".after*"))


def test_what_gguf_cannot_say_is_refused(tmp_path):
    before = source(tmp_path, "qwen3_moe")
    config = json.loads((before / "config.json").read_text())
    (before / "config.json").write_text(json.dumps(config | {"norm_topk_prob": False}))
    with pytest.raises(ValueError, match="no way to say this model's normalize_top_k"):
        quantize(before, tmp_path / "after.gguf", Recipe(method="rtn"))
    assert not (tmp_path / "after.gguf").exists()
