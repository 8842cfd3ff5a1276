"""Instruction sets are chosen from features, and only those that are there."""

import pytest

from cpu_kernels import isa
from cpu_kernels.isa import ISAS, VARIABLE, amx_use, available, choose

HASWELL = dict.fromkeys(("avx2", "fma", "f16c"), True)
ICE_LAKE = HASWELL | dict.fromkeys(("avx512f", "avx512bw", "avx512vl", "avx512vnni"), True)
SAPPHIRE_RAPIDS = ICE_LAKE | {"amx-tile": True, "amx-int8": True}
ALDER_LAKE = HASWELL | {"avxvnni": True}
NEOVERSE = {"neon": True, "dotprod": True}


@pytest.mark.parametrize(
    ("features", "name"),
    [
        (SAPPHIRE_RAPIDS, "amx_int8"),
        (SAPPHIRE_RAPIDS | {"amx-int8": False}, "avx512_vnni"),
        (ICE_LAKE, "avx512_vnni"),
        (ALDER_LAKE, "avx_vnni"),
        (HASWELL, "avx2"),
        (NEOVERSE, "neon_dotprod"),
        ({}, "portable"),
        (HASWELL | {"fma": False}, "portable"),
    ],
)
def test_the_best_that_is_there(features, name, monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    assert choose("auto", features).name == name


def test_forced_by_argument_and_variable(monkeypatch):
    monkeypatch.setenv(VARIABLE, "portable")
    assert choose("auto", HASWELL).name == "portable"
    assert choose("avx2", HASWELL).name == "avx2"


def test_what_the_processor_lacks_is_refused():
    with pytest.raises(ValueError, match="lacks avx512f"):
        choose("avx512_vnni", HASWELL)
    with pytest.raises(ValueError, match="unknown instruction set"):
        choose("sse9", HASWELL)


@pytest.fixture
def processor(monkeypatch):
    """processor(features, refusal): what the host has, and why the system refuses AMX."""

    def pretend(features, refusal=""):
        monkeypatch.delenv(VARIABLE, raising=False)
        monkeypatch.setattr(isa, "processor_features", lambda: dict(features))
        monkeypatch.setattr(isa, "amx_refusal", lambda: refusal)

    return pretend


def test_amx_needs_permission(processor):
    processor(SAPPHIRE_RAPIDS)
    assert choose().name == "amx_int8"
    assert amx_use(choose()) == "used for prompts"
    assert "avx512_vnni was asked for" in amx_use(choose("avx512_vnni"))
    processor(SAPPHIRE_RAPIDS, "Operation not supported")
    assert choose().name == "avx512_vnni" and "amx_int8" not in available()
    assert "the system refuses it (Operation not supported)" in amx_use(choose())
    with pytest.raises(ValueError, match="lacks amx-tile"):
        choose("amx_int8")


def test_nobody_is_asked_for_what_the_processor_lacks(processor, monkeypatch):
    processor(ICE_LAKE)
    monkeypatch.setattr(isa, "amx_refusal", lambda: pytest.fail("the system was asked"))
    assert choose().name == "avx512_vnni"
    assert amx_use(choose()) == "not used: the processor has none for integers"


def test_the_system_refuses_what_the_processor_lacks():
    assert isa.amx_refusal() or isa.processor_features().get("amx-tile")


def test_this_machine_can_run_something():
    assert available()[-1] == "portable"
    assert set(available()) <= set(ISAS)
