"""Instruction sets are chosen from features, and only those that are there."""

import ctypes
import sys

import pytest
from llvmlite import binding, ir

from cpu_kernels import isa, simd
from cpu_kernels.isa import ISAS, VARIABLE, amx_use, available, choose, features_for_llvm

HASWELL = dict.fromkeys(("avx2", "fma", "f16c"), True)
ICE_LAKE = HASWELL | dict.fromkeys(("avx512f", "avx512bw", "avx512vl", "avx512vnni"), True)
SAPPHIRE_RAPIDS = ICE_LAKE | {"amx-tile": True, "amx-bf16": True}
ALDER_LAKE = HASWELL | {"avxvnni": True}
NEOVERSE = {"neon": True, "dotprod": True}


@pytest.mark.parametrize(
    ("features", "name"),
    [
        (SAPPHIRE_RAPIDS, "amx_bf16"),
        (SAPPHIRE_RAPIDS | {"amx-bf16": False}, "avx512_vnni"),
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
    assert choose().name == "amx_bf16"
    assert amx_use(choose()).startswith("used for prompts")
    assert "avx512_vnni was asked for" in amx_use(choose("avx512_vnni"))
    processor(SAPPHIRE_RAPIDS, "Operation not supported")
    assert choose().name == "avx512_vnni" and "amx_bf16" not in available()
    assert "the system refuses it (Operation not supported)" in amx_use(choose())
    with pytest.raises(ValueError, match="lacks amx-tile"):
        choose("amx_bf16")


def test_nobody_is_asked_for_what_the_processor_lacks(processor, monkeypatch):
    processor(ICE_LAKE)
    monkeypatch.setattr(isa, "amx_refusal", lambda: pytest.fail("the system was asked"))
    assert choose().name == "avx512_vnni"
    assert amx_use(choose()) == "not used: the processor has none for bfloat16"


def test_the_system_refuses_what_the_processor_lacks():
    assert isa.amx_refusal() or isa.processor_features().get("amx-tile")


def test_this_machine_can_run_something():
    assert available()[-1] == "portable"
    assert set(available()) <= set(ISAS)


class Library:
    """The C library of an ARM machine that has dot products, or not."""

    def __init__(self, has_dot_products):
        self.has_dot_products = has_dot_products

    def getauxval(self, kind):
        others = 0x0018_7FFF  # asimd and what a processor of ARMv8.2 may have beside it
        return (others & ~(1 << 20) | self.has_dot_products << 20) if kind == 16 else 0

    def sysctlbyname(self, name, value, size, new, new_size):
        if name != b"hw.optional.arm.FEAT_DotProd" or size._obj.value != 4:
            return -1
        value._obj.value = self.has_dot_products
        return 0


@pytest.mark.parametrize("has_dot_products", [True, False])
@pytest.mark.parametrize(
    ("platform", "triple", "known"),
    [
        ("linux", "aarch64-unknown-linux-gnu", {"neon": True, "lse": True, "sve": False}),
        ("linux", "aarch64-unknown-linux-gnu", {}),
        ("darwin", "arm64-apple-darwin24.1.0", {}),
    ],
)
def test_arm_systems_are_asked_for_dot_products(
    platform, triple, known, has_dot_products, monkeypatch
):
    """LLVM lists them nowhere, on macOS not even neon."""
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(binding, "get_process_triple", lambda: triple)
    monkeypatch.setattr(binding, "get_host_cpu_features", lambda: known)
    library = Library(has_dot_products)
    library.getauxval = lambda kind: Library.getauxval(library, kind)  # it gets argtypes
    monkeypatch.setattr(ctypes, "CDLL", lambda name: library)
    assert available() == ["neon_dotprod", "portable"][not has_dot_products :]
    told = features_for_llvm().split(",")
    assert ("+dotprod" if has_dot_products else "-dotprod") in told and "+neon" in told
    assert all(("+" if present else "-") + name in told for name, present in known.items())


def test_elsewhere_llvm_knows_all():
    refused = isa.processor_features().get("amx-tile", False) and isa.amx_refusal()
    if not refused and not isa.is_arm(binding.get_process_triple()):
        assert features_for_llvm() == ""


@pytest.mark.parametrize(
    ("triple", "name", "quick"),
    [
        ("x86_64-unknown-linux-gnu", "znver3", True),
        ("x86_64-pc-windows-msvc", "emeraldrapids", False),
        ("arm64-apple-darwin23", "apple-m1", True),
    ],
)
def test_lines_used_once_are_asked_for_as_the_processor_likes(monkeypatch, triple, name, quick):
    monkeypatch.setattr(binding, "get_process_triple", lambda: triple)
    monkeypatch.setattr(binding, "get_host_cpu_name", lambda: name)
    assert isa.has_quick_streams.__wrapped__() is quick
    monkeypatch.setattr(simd, "has_quick_streams", lambda: quick)
    builder = ir.IRBuilder(
        ir.Function(ir.Module(), ir.FunctionType(ir.VoidType(), []), "f").append_basic_block()
    )
    emitter = simd.Emitter(builder)
    emitter.prefetch(emitter.integer(64), keep=False)
    locality = 0 if quick else 3
    assert f"i32 0, i32 {locality}, i32 1)" in str(builder.block)
