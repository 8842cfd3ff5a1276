"""`tiered calibrate`: this machine, measured and kept, and what `info` and `plan` make of that."""

import json
from dataclasses import asdict, replace
from types import SimpleNamespace

import numpy as np
import pytest
from naive_formats import to_float64

import cpu_kernels.cache  # noqa: F401  kernels stay where they are, when the user's cache moves
from cpu_kernels.formats import FORMATS
from gpu_backend.calibrate import Calibration, save
from gpu_backend.tuning import Tuning, find_tuning
from tiered.demo import random_tiny_model
from tiered.experts import expert_layout
from tiered.gpu.known_costs import known_costs, measure_rows
from tiered.measuring import this_machine
from tiered.measuring.measure import random_blob
from tiered.measuring.this_machine import (
    HostSpeed,
    described_gpu,
    known_gpus,
    known_host,
    save_host,
)
from tiered.planning.costs import Costs
from tiered.user_cache import gpu_file, machine_file, user_cache

LINK = ((1 << 16, 2e-5), (1 << 26, 5e-3))
CARD = Calibration("a card", 16 << 30, 280e9, 90e12, LINK, LINK, LINK, 3e-6, 1.1e-5, 1 << 33)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(this_machine, "SCRATCH_MIB", 8)
    monkeypatch.setattr("tiered.measuring.measure.SECONDS", 0.05)


def host(**changes):
    speed = HostSpeed(
        this_machine.platform.node(), this_machine.processor_name(), "avx2",
        "2026-01-01T12:00:00+00:00", {1: 10.0, 2: 18.0}, {1: 100.0, 2: 190.0}, "/models",
        {1 << 20: 2.5}, 80.0,
    )  # fmt: skip
    return HostSpeed(**asdict(speed) | changes)


def keep_cards(*names):
    for number, name in enumerate(names or [CARD.device]):
        save(gpu_file(), f"cuda:{number}", replace(CARD, device=name))


def test_calibrate_measures_keeps_and_leaves_no_file_behind(tiered, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    status, out, err = tiered("calibrate", "--device", "cpu", "--disk", disk, "--json")
    assert status == 0, err
    got = json.loads(out)
    assert min(got["memory_gb_s"].values()) > 0 and got["disk_folder"] == str(disk)
    assert all(rate > 0 for rate in got["disk_gb_s"].values()) and len(got["disk_gb_s"]) == 3
    assert not list(disk.iterdir()) and [f.name for f in user_cache().iterdir()] == ["machine.json"]
    status, out, _ = tiered("info", "--json")
    assert status == 0 and json.loads(out)["measured"] == known_host().measured


def test_info_says_what_to_do_and_then_what_was_measured(tiered):
    assert "tiered calibrate" in tiered("info")[1]
    save_host(host())
    keep_cards()
    _, out, _ = tiered("info")
    assert "18 GB/s with 2 threads" in out and "/models" in out
    assert "a card" in out and "280 GB/s" in out and "16.0 GiB" in out and "90 TFLOP/s" in out


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"node": 1}', '{"bandwidth_gb_s": {"x": 1}}'])
def test_what_cannot_be_read_was_not_measured(tiered, text):
    machine_file().parent.mkdir(parents=True)
    machine_file().write_text(text)
    gpu_file().write_text(text)
    assert known_host() is None and not known_gpus()
    assert tiered("info")[0] == 0


def test_another_machine_with_the_same_home_is_not_this_one():
    save_host(host(node="elsewhere"))
    keep_cards()
    assert known_host() is None and not known_gpus()
    save_host(host())
    assert known_host() == host() and known_gpus()["cuda:0"]["device"] == "a card"


def test_a_card_as_a_forecast_wants_it():
    gpu = described_gpu(asdict(CARD))
    assert (gpu.vram, gpu.bandwidth, gpu.compute) == (16 << 30, 280.0, 90.0)
    assert gpu.link == pytest.approx(13.42, rel=1e-3) and gpu.copy_latency == pytest.approx(20)
    assert (gpu.launch, gpu.sync) == (pytest.approx(3), pytest.approx(11))


def test_plan_of_this_machine_has_the_card(tiered, tmp_path):
    pytest.importorskip("numba")
    arguments = "plan", random_tiny_model(tmp_path), "--threads", "1", "--context", "64"
    status, _, err = tiered(*arguments, "--vram", "4G")
    assert status == 2 and "tiered calibrate" in err
    save_host(host())
    keep_cards()
    status, out, _ = tiered(*arguments, "--vram", "4G", "--json")
    got = json.loads(out)["hardware"]
    assert status == 0 and "a card" in got["label"] and got["gpu"]["vram"] == 4 << 30


def test_several_cards_are_measured_shown_and_forecast(tiered, tmp_path, monkeypatch):
    pytest.importorskip("numba")
    asked = []

    def measure(name):
        asked.append(name)
        found = replace(CARD, device=f"card {name[-1]}", vram=(int(name[-1]) + 1) << 30)
        save(gpu_file(), name, found)
        return asdict(found)

    monkeypatch.setattr("tiered.backend.calibrate_gpu", measure)
    user_cache().mkdir(parents=True)
    status, out, err = tiered("calibrate", "--device", "cuda:0,cuda:1", "--json")
    assert status == 0, err
    assert asked == ["cuda:0", "cuda:1"] and json.loads(out)["cuda:1_gpu"] == "card 1"
    assert list(known_gpus()) == asked
    _, out, _ = tiered("info")
    assert "cuda:0 vram" in out and "card 1" in out
    arguments = "plan", random_tiny_model(tmp_path), "--threads", "1", "--context", "64"
    for names in ("cuda:0,cuda:1", "cuda:all"):
        status, out, err = tiered(*arguments, "--gpu", names, "--vram", "2G,4G", "--json")
        assert status == 0, err
        got = json.loads(out)["hardware"]
        assert got["gpu"]["vram"] == 6 << 30 and "card 0 and " in got["label"]
    status, _, err = tiered(*arguments, "--gpu", "cuda:2")
    assert status == 2 and "tiered calibrate --device cuda:2` has not measured" in err


def test_an_engine_begins_with_what_was_measured():
    card = SimpleNamespace(device=SimpleNamespace(machine=None))
    unknown = Costs.unknown(1000)
    assert known_costs(card, "cuda:0", 1000).link.per_byte == unknown.link.per_byte
    save_host(host())
    keep_cards()
    costs = known_costs(card, "cuda:0", 1000)
    assert costs.link.per_byte == pytest.approx(LINK[-1][1] / LINK[-1][0])
    assert costs.gpu.per_byte == pytest.approx(1 / (0.8 * CARD.memory))
    assert known_costs(card, "cuda:1", 1000).link.per_byte == unknown.link.per_byte


def test_what_further_rows_take_is_measured():
    layout = SimpleNamespace(nbytes=1000)
    card = SimpleNamespace(few_rows=16, host_seconds=lambda layer, layout, rows: 1 + 0.1 * rows)
    costs = Costs.unknown(1000)
    measure_rows(card, None, layout, costs)
    assert costs.cpu(1000) == pytest.approx(1.1)
    assert costs.cpu(costs.work(1000, 16, 16)) == pytest.approx(2.6, rel=1e-3)
    assert costs.cpu(costs.work(1000, 17, 16)) == pytest.approx(3.7, rel=1e-3)


def test_calibrate_refuses_what_it_does_not_know(tiered):
    status, _, err = tiered("calibrate", "--device", "tpu")
    assert status == 2 and "cpu, cuda" in err


def test_the_quickest_tuning_is_found_and_what_a_card_cannot_run_left_out():
    def decode(tuning):
        if tuning.rows == 64:
            raise RuntimeError("out of resources")
        return abs(tuning.rows - 40) + abs(tuning.warps - 8)

    def prefill(tuning):
        assert tuning.rows == 32 and tuning.warps == 8  # decode was decided first
        return abs(tuning.tile_tokens - 64) + abs(tuning.tile_rows - 16)

    assert find_tuning(decode, prefill, Tuning()) == Tuning(
        rows=32, warps=8, tile_tokens=64, tile_rows=16
    )
    same = find_tuning(lambda tuning: 1.0, lambda tuning: 1.0, Tuning(rows=8))
    assert same == Tuning(rows=8)


@pytest.mark.parametrize("format", FORMATS)
def test_experts_are_measured_with_weights_of_usual_size(format):
    layout = expert_layout(512, 256, format, format, format)
    blob = random_blob(layout)
    assert blob.shape == (layout.nbytes,)
    for tensor in layout:
        data = blob[tensor.offset : tensor.offset + tensor.nbytes]
        sizes = np.abs(to_float64(data, format, tensor.shape))
        assert 1e-12 < np.median(sizes[sizes > 0]) < 1e12
        assert sizes.max() < 1e30
