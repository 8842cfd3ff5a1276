"""Instruction sets are chosen from features, and only those that are there."""

import pytest

from cpu_kernels.isa import ISAS, VARIABLE, available, choose

HASWELL = dict.fromkeys(("avx2", "fma", "f16c"), True)
ICE_LAKE = HASWELL | dict.fromkeys(("avx512f", "avx512bw", "avx512vl", "avx512vnni"), True)
ALDER_LAKE = HASWELL | {"avxvnni": True}
NEOVERSE = {"neon": True, "dotprod": True}


@pytest.mark.parametrize(
    ("features", "name"),
    [
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


def test_this_machine_can_run_something():
    assert available()[-1] == "portable"
    assert set(available()) <= set(ISAS)
