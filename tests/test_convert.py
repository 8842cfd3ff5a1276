"""Stores: what was converted computes like its source, and nothing half-written ever opens."""

import errno
import json
import shutil
from collections import namedtuple

import numpy as np
import pytest
import tiny
from mmap_ninja import numpy as mmap_ninja_numpy

from tiered.checkpoints.config_json import config_from_json, config_to_json
from tiered.checkpoints.facts import Facts
from tiered.experts import ExpertKey
from tiered.formats import CheckpointError, open_checkpoint
from tiered.store import ExpertStore
from tiered.weights.convert import convert
from tiered.weights.dense import dense_matrix

MIXED = dict(format="q4_k", formats={"blk.1.ffn_down": "q6_k"})


def source(folder, model_type, kind):
    if kind == "gguf":
        return tiny.gguf_checkpoint(folder / "tiny.gguf", model_type, **MIXED)
    return tiny.hf_checkpoint(folder / "hf", model_type, kind, tokenizer=True)


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = tmp_path_factory.mktemp("store")
    return convert(tiny.hf_checkpoint(folder / "hf", "mixtral"), folder / "store")


@pytest.fixture
def store(original, tmp_path):
    return shutil.copytree(original, tmp_path / "store")


@pytest.mark.parametrize("model_type", tiny.ARCHITECTURES)
@pytest.mark.parametrize("kind, quantize", [("gguf", "int4"), ("bf16", "int4"), ("f32", "none")])
def test_the_same_bytes_reach_the_arithmetic(tmp_path, model_type, kind, quantize):
    check_same_bytes(source(tmp_path, model_type, kind), tmp_path, quantize)


@pytest.mark.parametrize("quantize", ["int4", "int4_g128", "nf4"])
def test_experts_become_the_format_of_choice(tmp_path, quantize):
    model = tiny.hf_checkpoint(tmp_path / "hf", "mixtral", hidden=384, head_dim=96, expert_size=128)
    check_same_bytes(model, tmp_path, quantize)
    with open_checkpoint(tmp_path / "store") as checkpoint, open_checkpoint(model) as original:
        format = {"int4": "q4_0"}.get(quantize, quantize)
        for part in ("gate", "up", "down"):
            name = f"layers.1.experts.3.{part}"
            assert checkpoint.tensors[name].format == format
            values, lost = original.float32(name), checkpoint.float32(name)
            # Half of the widest step between two codes, of what is largest in its block.
            assert np.abs(lost - values).max() <= 0.16 * np.abs(values).max()
        assert checkpoint.tensors["layers.1.q"].format == "q8_0"


def check_same_bytes(model, tmp_path, quantize):
    calls = []
    path = convert(model, tmp_path / "store", quantize, lambda *call: calls.append(call))
    assert calls[-1][0] == calls[-1][1]
    with open_checkpoint(model) as a, open_checkpoint(path) as b:
        assert a.config == b.config and a.tensors.keys() == b.tensors.keys()
        for name, tensor in a.tensors.items():
            if ".experts." not in name and len(tensor.shape) == 2:
                first, second = dense_matrix(a, name, quantize), dense_matrix(b, name, quantize)
                assert first[1:] == second[1:] and np.array_equal(first[0], second[0])
            elif len(tensor.shape) == 1:
                assert np.array_equal(a.float32(name), b.float32(name))
        with ExpertStore(a, quantize) as from_source, ExpertStore(b, quantize) as from_store:
            assert from_store.mappable
            for layer in a.config.sparse_layers:
                layout = from_source.layout(layer)
                assert from_store.layout(layer) == layout
                blobs = np.zeros((2, layout.nbytes), np.uint8)
                for expert in range(a.config.num_experts):
                    from_source.read_into(ExpertKey(layer, expert), blobs[0])
                    from_store.read_into(ExpertKey(layer, expert), blobs[1])
                    assert np.array_equal(blobs[0], blobs[1])
                    assert from_store.addresses(ExpertKey(layer, expert))[0] % 4096 == 0
        assert b.verify() == len(b.metadata["files"])


@pytest.mark.parametrize("kind", ["gguf", "bf16"])
def test_a_store_stands_on_its_own(tmp_path, kind):
    pytest.importorskip("tokenizers")
    from tiered.text.tokenizer import load_tokenizer

    model = source(tmp_path, "olmoe", kind)
    path = convert(model, tmp_path / "store")
    with open_checkpoint(model) as a:
        expected = load_tokenizer(a.tokenizer_source).encode("the hat in the air")
    shutil.rmtree(model) if model.is_dir() else model.unlink()
    with open_checkpoint(path) as b:
        tokenizer = load_tokenizer(b.tokenizer_source)
        assert tokenizer.encode("the hat in the air") == expected
        assert b.config.eos_ids == (319,)


def test_blobs_are_an_array_of_mmap_ninja(tmp_path):
    path = convert(source(tmp_path, "olmoe", "gguf"), tmp_path / "store")
    with open_checkpoint(path) as checkpoint:
        tensor = checkpoint.tensors["layers.1.experts.3.gate"]
        number = tensor.file.parent.name
        array = mmap_ninja_numpy.open_existing(path / number)
        assert array.dtype == np.uint8 and array.shape[0] == 8 and array.shape[1] % 4096 == 0
        assert np.array_equal(array[3, : tensor.nbytes], checkpoint.data(tensor.name))
    assert sorted(p.name for p in path.glob("experts-*")) == ["experts-0", "experts-1"]


def test_nothing_is_overwritten(tmp_path):
    model = source(tmp_path, "mixtral", "bf16")
    (tmp_path / "mine").mkdir()
    with pytest.raises(FileExistsError, match="exists already"):
        convert(model, tmp_path / "mine")
    assert (tmp_path / "mine").exists()


def test_a_full_disk_is_seen_before_writing(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9, 1000))
    with pytest.raises(OSError, match="bytes are needed, but only 1000 are free") as raised:
        convert(source(tmp_path, "mixtral", "bf16"), tmp_path / "store")
    assert raised.value.errno == errno.ENOSPC and not (tmp_path / "store").exists()


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
@pytest.mark.parametrize("after", [1, 5, 17, 20])
def test_an_interrupted_conversion_leaves_nothing(tmp_path, error, after):
    calls = iter(range(after))

    def progress(done, total):
        if next(calls, None) is None:
            raise error

    with pytest.raises(error):
        convert(source(tmp_path, "mixtral", "bf16"), tmp_path / "store", progress=progress)
    assert not (tmp_path / "store").exists()


def test_a_killed_conversion_does_not_open(tmp_path, monkeypatch):
    """As when the process ends at once: nobody cleans up."""
    states = []

    def progress(done, total):
        if len(states) < 30:
            states.append(shutil.copytree(tmp_path / "store", tmp_path / f"state{len(states)}"))

    convert(source(tmp_path, "mixtral", "bf16"), tmp_path / "store", progress=progress)
    shutil.copytree(tmp_path / "store", tmp_path / "last")
    (tmp_path / "last" / "manifest.json").rename(tmp_path / "last" / "manifest.json.partial")
    for state in [*states, tmp_path / "last"]:
        with pytest.raises(CheckpointError) as raised:
            open_checkpoint(state)
        assert str(state) in str(raised.value)
    assert "is half-written" in str(raised.value)


def edit(store, change):
    file = store / "manifest.json"
    manifest = json.loads(file.read_text())
    change(manifest)
    file.write_text(json.dumps(manifest))


DAMAGE = {
    "version": (lambda m: m.update(version=99), "not a store of version"),
    "format": (lambda m: m.update(format="other"), "not a store of version"),
    "no config": (lambda m: m.pop("config"), "'config' is missing"),
    "config": (lambda m: m["config"].update(num_layers="two"), "'num_layers' is 'two'"),
    "rope": (lambda m: m["config"].update(rope=3), "'rope' is 3"),
    "top_k": (lambda m: m["config"].update(top_k=9), "top_k is 9"),
    "dense entry": (lambda m: m["dense"].update(norm=["f32", [64]]), "tensor 'norm' is damaged"),
    "dense type": (lambda m: m["dense"].update(norm=["q9", [64], 0]), "'norm' is damaged"),
    "dense past the end": (
        lambda m: m["dense"].update(norm=["f32", [64], 2**63]), "'norm' is damaged"),
    "missing tensor": (lambda m: m["dense"].pop("norm"), "tensor 'norm' is missing"),
    "array": (lambda m: m["experts"]["0"].__setitem__(0, 7), "layer 0 is damaged"),
    "row": (lambda m: m["experts"]["0"].__setitem__(1, 2**60), "layer 0 is damaged"),
    "negative row": (lambda m: m["experts"]["0"].__setitem__(1, -1), "layer 0 is damaged"),
    "stride": (lambda m: m["experts"]["0"].__setitem__(2, 8), "layer 0 is damaged"),
    "formats": (lambda m: m["experts"]["0"].__setitem__(3, ["q4_0"]), "layer 0 is damaged"),
    "missing layer": (lambda m: m["experts"].pop("1"), r"'layers\.1\.experts\.0\.gate' is missing"),
    "file outside": (
        lambda m: m["files"].update({"../x": dict(nbytes=0, sha256="")}), "x is missing"),
    "no files": (lambda m: m.update(files={}), "is damaged"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_manifests(store, name):
    change, message = DAMAGE[name]
    edit(store, change)
    with pytest.raises(CheckpointError, match=message) as raised:
        open_checkpoint(store)
    assert str(store) in str(raised.value) and "\n" not in str(raised.value)


def test_truncated_and_missing_files(store):
    data = store / "experts-0" / "data.ninja"
    with data.open("rb+") as file:
        file.truncate(4096)
    with pytest.raises(CheckpointError, match="has 4096 bytes instead of"):
        open_checkpoint(store)
    data.unlink()
    with pytest.raises(CheckpointError, match=r"data\.ninja is missing"):
        open_checkpoint(store)


@pytest.mark.parametrize("name", ["dense.bin", "experts-0/data.ninja"])
def test_checksums(store, name):
    with (store / name).open("rb+") as file:
        file.seek(5000)
        byte = file.read(1)[0]
        file.seek(5000)
        file.write(bytes([byte ^ 1]))
    message = f"{name} is damaged: its checksum differs"
    with open_checkpoint(store) as checkpoint, pytest.raises(CheckpointError, match=message):
        checkpoint.verify()


def test_configurations_survive_json(tmp_path):
    for model_type in tiny.ARCHITECTURES:
        folder = tiny.hf_checkpoint(
            tmp_path / model_type, model_type,
            config={"rope_scaling": dict(type="yarn", factor=3.0,
                                         original_max_position_embeddings=64)},
        )  # fmt: skip
        with open_checkpoint(folder) as checkpoint:
            text = json.dumps(config_to_json(checkpoint.config))
            again = config_from_json(Facts(json.loads(text), folder))
            assert again == checkpoint.config
