"""Downloads from a hub on localhost: checked, resumed, held once, and never outside the cache."""

import json

import fake_hub
import pytest
from click.testing import CliRunner

from tiered.commands import find
from tiered.hub import download as hub
from tiered.hub import pulled
from tiered.hub.download import Name, RemoteFile, choose_files


@pytest.fixture
def remote(tmp_path, monkeypatch):
    with fake_hub.running(tmp_path, monkeypatch) as hub:
        yield hub


def pull(text, **options):
    name = Name.parse(text)
    return hub.pull(name, hub.list_remote(name), **options)


def test_a_quantization_is_downloaded_checked_and_found(remote):
    counted = []
    path = pull("user/repo:q4_k_m", progress=counted.append)
    assert path.read_bytes() == remote.files["m-Q4_K_M.gguf"]
    assert sum(counted) == path.stat().st_size
    assert {key for _, key, _ in remote.seen} == {"Bearer secret"}
    assert pulled.find_model("user/repo:Q4_K_M") == path
    num_requests = len(remote.seen)
    assert pull("user/repo:Q4_K_M") == path
    assert len(remote.seen) == num_requests + 1  # the listing: the file is there


def test_an_interrupted_download_goes_on(remote):
    remote.cut = 1000
    with pytest.raises(OSError, match="1000 of 10240 bytes"):
        pull("user/repo:Q4_K_M")
    assert pulled.pulled() == []
    counted = []
    path = pull("user/repo:Q4_K_M", progress=counted.append)
    assert remote.seen[-1][2] == "bytes=1000-"
    assert counted[0] == 1000 and sum(counted) == 10240
    assert path.read_bytes() == remote.files["m-Q4_K_M.gguf"]


def test_a_server_without_ranges_begins_again(remote):
    remote.cut, remote.ranges = 1000, False
    with pytest.raises(OSError, match="1000 of"):
        pull("user/repo:Q4_K_M")
    assert pull("user/repo:Q4_K_M").read_bytes() == remote.files["m-Q4_K_M.gguf"]


def test_a_wrong_checksum_is_refused(remote):
    remote.wrong = {"m-Q4_K_M.gguf"}
    remote.files["m-Q4_K_M.gguf"] = b"abc"
    with pytest.raises(OSError, match="checksum"):
        pull("user/repo:Q4_K_M")
    assert not list(hub.cache_folder().rglob("*incomplete"))


def test_offline_nothing_is_asked_for(remote, monkeypatch):
    path = pull("user/repo:Q8_0")
    assert path.name == "m-Q8_0-00001-of-00002.gguf"
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(OSError, match="OFFLINE"):
        pull("user/repo:Q8_0")
    assert pulled.find_model("user/repo") == path


def test_errors_say_what_to_do(remote):
    with pytest.raises(OSError, match="no such model"):
        pull("user/other")
    with pytest.raises(ValueError, match="has m-Q4_K_M, m-Q8_0"):
        pull("user/repo:Q3")
    with pytest.raises(ValueError, match="say which"):
        pull("user/repo")
    with pytest.raises(ValueError, match="expected user/repo"):
        Name.parse("../../etc/passwd")
    with pytest.raises(FileNotFoundError, match="tiered pull user/none"):
        pulled.find_model("user/none")


def test_files_outside_the_folder_and_code_are_left_out():
    digest = "0" * 64
    names = ["../m.safetensors", "/m.safetensors", "a\\..\\m.safetensors", "run.py", "config.json"]
    files = [RemoteFile(name, 1, digest) for name in [*names, "model.safetensors"]]
    chosen = choose_files(Name("user/repo"), files)
    assert [file.name for file in chosen] == ["config.json", "model.safetensors"]
    with pytest.raises(ValueError):
        choose_files(Name("user/repo"), [RemoteFile("model.safetensors", 1, "../../x")])


def test_the_commands(remote):
    run = CliRunner().invoke
    result = run(find("pull"), ["user/repo:Q4_K_M", "--dry-run", "--json"])
    assert '"bytes": 10240' in result.output
    assert "m-Q4_K_M.gguf" in run(find("pull"), ["user/repo:Q4_K_M"]).output
    run(find("pull"), ["user/repo:Q8_0"])
    assert "user/repo:Q4_K_M" in run(find("ls"), []).output
    assert len(json.loads(run(find("ls"), ["--json"]).output)["models"]) == 2
    assert run(find("rm"), ["-y", "user/repo:Q4_K_M"]).exit_code == 0
    assert [str(model.name) for model in pulled.pulled()] == ["user/repo:Q8_0"]
    assert run(find("rm"), ["-y", "user/repo"]).exit_code == 0
    assert not list(hub.cache_folder().iterdir())
