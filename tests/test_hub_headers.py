"""What a model of the hub needs, told before it is downloaded, from its headers alone."""

import json
from dataclasses import replace

import fake_hub
import pytest
import tiny
from click.testing import CliRunner
from fake_hub import COMMIT

from tiered.checkpoints.checkpoint import CheckpointError
from tiered.commands import find
from tiered.formats import open_checkpoint
from tiered.hub import download as hub
from tiered.hub import skeleton
from tiered.hub.download import Name
from tiered.planning import sizes
from tiered.planning.needs import needs_of

LARGE = dict(hidden=512, expert_size=512, head_dim=128)  # weights outweigh headers
MAKERS = {
    "gguf": lambda p: tiny.gguf_checkpoint(p / "m.gguf", "qwen3_moe", "q4_0", **LARGE).parent,
    "split": lambda p: tiny.gguf_checkpoint(p / "m.gguf", "mixtral", parts=3, **LARGE).parent,
    "folder": lambda p: tiny.hf_checkpoint(p, "olmoe", num_files=2, tokenizer=True, **LARGE),
}


@pytest.fixture
def remote(tmp_path, monkeypatch):
    with fake_hub.running(tmp_path, monkeypatch) as hub:
        yield hub


def publish(server, folder):
    server.files = {file.name: file.read_bytes() for file in sorted(folder.iterdir())}
    name = Name("user/repo")
    return name, hub.list_remote(name)


@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.parametrize("kind", MAKERS)
def test_sizes_are_those_of_the_whole_model(remote, tmp_path, kind, ranges, monkeypatch):
    monkeypatch.setattr(skeleton, "GGUF_STARTS", (64 << 10, 1 << 20))
    monkeypatch.setattr(skeleton, "SAFETENSORS_START", 64 << 10)
    (tmp_path / "real").mkdir()
    real = MAKERS[kind](tmp_path / "real")
    remote.ranges = ranges
    name, listing = publish(remote, real)
    path = skeleton.make_skeleton(name, listing, tmp_path / "made")
    first = min(real.glob("*.gguf"), default=real)
    with open_checkpoint(path) as made, open_checkpoint(first) as whole:
        assert made.config == whole.config
        assert sizes.of_checkpoint(made) == replace(sizes.of_checkpoint(whole), name=path.name)
        assert {t.name: t[1:3] for t in made.tensors.values()} == {
            t.name: t[1:3] for t in whole.tensors.values()
        }
    asked = [wanted for path, _, wanted in remote.seen if f"/resolve/{COMMIT}/" in path]
    assert all(wanted.startswith("bytes=0-") for wanted in asked)
    assert not [path for path, _, _ in remote.seen if "tokenizer" in path]
    largest = max(int(wanted.rpartition("-")[2]) for wanted in asked)
    assert largest < max(len(body) for body in remote.files.values()) // 2


@pytest.mark.parametrize(("kind", "starts"), [("gguf", (64, 5000, 1 << 20)), ("folder", 100)])
def test_a_long_header_is_asked_for_again(remote, tmp_path, monkeypatch, kind, starts):
    monkeypatch.setattr(skeleton, "GGUF_STARTS", starts)
    monkeypatch.setattr(skeleton, "SAFETENSORS_START", starts)
    (tmp_path / "real").mkdir()
    name, listing = publish(remote, MAKERS[kind](tmp_path / "real"))
    with open_checkpoint(skeleton.make_skeleton(name, listing, tmp_path / "made")) as made:
        assert made.config.num_experts == 8
    if kind == "gguf":
        ends = [int(wanted.rpartition("-")[2]) + 1 for _, _, wanted in remote.seen if wanted]
        assert ends == [64, 5000, min(1 << 20, listing.files[0].nbytes)]


def test_what_is_here_is_not_asked_for(remote, tmp_path):
    (tmp_path / "real").mkdir()
    name, listing = publish(remote, MAKERS["gguf"](tmp_path / "real"))
    hub.pull(name, listing)
    before = len(remote.seen)
    with open_checkpoint(skeleton.make_skeleton(name, listing, tmp_path / "made")) as made:
        assert made.config.num_experts == 8
    assert len(remote.seen) == before


def test_a_cut_answer_is_an_error(remote, tmp_path):
    (tmp_path / "real").mkdir()
    name, listing = publish(remote, MAKERS["gguf"](tmp_path / "real"))
    remote.cut = 10
    with pytest.raises(OSError, match=r"ended at 10 of"):
        skeleton.make_skeleton(name, listing, tmp_path / "made")


def test_damage_is_an_error(remote, tmp_path):
    remote.files = {"m.gguf": b"GGUF" + b"\xff" * 1000}
    name = Name("user/repo")
    with pytest.raises(CheckpointError, match=r"m\.gguf: "):
        skeleton.make_skeleton(name, hub.list_remote(name), tmp_path / "made")


def test_the_command_tells_before_it_downloads(remote, tmp_path):
    (tmp_path / "real").mkdir()
    publish(remote, MAKERS["gguf"](tmp_path / "real"))
    result = CliRunner().invoke(find("pull"), ["user/repo", "--dry-run", "--json"])
    facts = json.loads(result.stdout)
    assert facts["memory"]["least_bytes"] < facts["memory"]["all_bytes"]
    assert "it fits: it takes" in result.stderr
    assert not hub.cache_folder().exists()


def test_the_command_warns_of_what_cannot_be_run(remote, tmp_path):
    remote.files = {"m.gguf": b"GGUF" + bytes(100)}
    result = CliRunner().invoke(find("pull"), ["user/repo", "--dry-run", "--json"])
    assert result.exit_code == 0
    assert json.loads(result.stdout)["problem"].startswith("tiered cannot run it: m.gguf: GGUF ver")
    assert "warning: tiered cannot run it" in result.stderr
    assert "m.gguf" in CliRunner().invoke(find("pull"), ["user/repo"]).stdout  # all the same


def test_needs():
    from tiered.planning import shapes

    model = sizes.of_shape(shapes.find("mixtral-8x7b"), "q4_0")
    whole = needs_of(model, 1 << 50)
    assert whole.experts_in_memory == 1 and whole.verdict.startswith("it fits")
    half = needs_of(model, (whole.all_bytes + whole.least_bytes) // 2)
    assert 0.5 < half.experts_in_memory < 0.75  # the floor is one layer's
    assert "of the experts fit" in half.verdict and "at least" in half.verdict
    none = needs_of(model, whole.least_bytes - 1)
    assert none.verdict.startswith("it does not run: it takes")
    assert needs_of(model, 0).experts_in_memory == 0
    assert needs_of(model, 0, context=1 << 40).context == model.context_length
