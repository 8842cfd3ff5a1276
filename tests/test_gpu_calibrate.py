"""Calibration, pinning and tuning on devices whose limits and speeds are known. Needs no torch."""

import json
from dataclasses import replace

import pytest
from fake_gpu import FakePinner

from gpu_backend.calibrate import calibrate, save
from gpu_backend.pinning import Arena, probe_limit
from gpu_backend.tuning import Tuning, find_tuning, load_tuning, save_tuning

MIB = 1 << 20


class FakeProbe:
    """A device with 500 GB/s of memory and a link of 20 GB/s that starts in 10 us."""

    def __init__(self):
        self.calls = 0

    def read_memory(self, nbytes):
        self.calls += 1
        return nbytes / 500e9 * (10 if self.calls == 1 else 1)  # cold the first time

    def copy(self, nbytes, pinned, competing):
        return (1e-5 + nbytes / 20e9) * (1.5 if competing else 1) * (1 if pinned else 2)

    def multiply(self, size):
        return 2 * size**3 / 50e12

    def launch(self):
        return 4e-6

    def synchronize(self):
        return 1.2e-5

    def pin_limit(self):
        return 1 << 30


def test_calibration_finds_what_is_there():
    found = calibrate(FakeProbe(), "card", 8 << 30)
    assert found.memory == pytest.approx(500e9)
    assert found.compute == pytest.approx(50e12) and found.vram == 8 << 30
    for points, times in ((found.link, 1), (found.link_competing, 1.5), (found.link_pageable, 2)):
        for nbytes, seconds in points:
            assert seconds == pytest.approx(times * (1e-5 + nbytes / 20e9))
    assert (found.launch, found.synchronize, found.pin_limit) == (4e-6, 1.2e-5, 1 << 30)


def test_one_slow_run_does_not_count():
    class Hiccup(FakeProbe):
        def launch(self):
            self.calls += 1
            return 1.0 if self.calls % 5 == 0 else 4e-6

    assert calibrate(Hiccup(), "card", 8 << 30).launch == 4e-6


def test_calibrations_are_stored_by_card(tmp_path):
    found, file = calibrate(FakeProbe(), "card", 8 << 30), tmp_path / "new" / "gpu.json"
    other = replace(found, device="other card", launch=1e-6)
    save(file, "cuda:0", found)
    save(file, "cuda:1", other)
    stored = json.loads(file.read_text())
    assert [stored[name]["device"] for name in ("cuda:0", "cuda:1")] == ["card", "other card"]
    save(file, "cuda:1", found)
    assert json.loads(file.read_text())["cuda:1"] == stored["cuda:0"]
    for text in ("[]", "no JSON"):
        file.write_text(text)
        save(file, "cuda:0", found)
        assert json.loads(file.read_text()) == {"cuda:0": stored["cuda:0"]}


@pytest.mark.parametrize("limit", [0, 3 * MIB, 700 * MIB, 1 << 40])
def test_the_probed_limit_is_exact_and_nothing_stays_locked(limit):
    pinner, arena = FakePinner(limit), Arena(1 << 20, 1 << 30)
    assert probe_limit(pinner, arena) == min(limit, arena.nbytes)
    assert not pinner.pinned
    assert pinner.refusals <= 9  # each may cost a driver some time


def test_a_probe_that_raises_unlocks_what_it_locked():
    class Raising(FakePinner):
        def pin(self, address, nbytes):
            if len(self.pinned) == 2:
                raise RuntimeError("the driver")
            return super().pin(address, nbytes)

    pinner = Raising(1 << 40)
    with pytest.raises(RuntimeError, match="the driver"):
        probe_limit(pinner, Arena(0, 1 << 30))
    assert not pinner.pinned


def test_tuning_is_stored_by_card(tmp_path):
    file, tuned = tmp_path / "tuning.json", Tuning(rows=8, warps=2)
    assert load_tuning(file, "card") == Tuning()
    save_tuning(file, "card", tuned)
    save_tuning(file, "other", Tuning())
    assert load_tuning(file, "card") == tuned
    file.write_text('{"card": {"rows": 3}}')
    assert load_tuning(file, "card") == Tuning()


@pytest.mark.parametrize("wrong", [dict(rows=12), dict(warps=0), dict(tile_tokens=8)])
def test_impossible_tunings_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Tuning(**wrong)


@pytest.fixture
def probe():
    for name in ("torch", "triton"):
        pytest.importorskip(name)
    from gpu_backend import probe

    return probe


def test_a_refused_pin_leaves_no_error_behind(probe, monkeypatch):
    """CUDA remembers it, and torch's next launch would report it."""
    remembered = []

    class Runtime:
        def cudaHostRegister(self, address, nbytes, flags):
            if nbytes > 100:
                remembered.append("out of memory")
            return 2 * (nbytes > 100)

    def launch():
        if remembered:
            raise RuntimeError(remembered.pop())

    monkeypatch.setattr(probe.torch.cuda, "cudart", Runtime)
    pinner = probe.CudaPinner(-1, launch)
    assert pinner.pin(0, 100) and not pinner.pin(0, 101)
    launch()


def test_what_a_card_has_too_few_registers_for_is_left_out(probe, monkeypatch):
    from triton.runtime.errors import OutOfResources

    class Launcher:
        def __init__(self, tuning, capability, index):
            self.tuning = tuning

        def quantize(self, x):
            return x

        def linear(self, a, matrix):
            if self.tuning.rows > 16:
                raise OutOfResources(2, 1, "registers")

    monkeypatch.setattr(probe, "Launcher", Launcher)
    monkeypatch.setattr(probe.torch.cuda, "get_device_capability", lambda device: (8, 9))
    monkeypatch.setattr(probe, "EXPERT_SHAPE", (32, 32))
    card = probe.CudaProbe.__new__(probe.CudaProbe)
    card._device = probe.torch.device("cpu")
    seconds = {4: 3.0, 8: 2.0, 16: 4.0}
    card._seconds = lambda work: work() or 1.0

    def decode(tuning):
        card.decode(tuning)
        return seconds[tuning.rows]

    assert find_tuning(decode, card.prefill, Tuning()).rows == 8
