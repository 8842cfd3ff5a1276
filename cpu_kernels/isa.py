"""Which instructions the kernels use: found out from the processor's features, or forced.

An instruction that the processor lacks is not an error in LLVM: it ends the process. Kernels are
therefore chosen here, before anything is compiled.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Mapping
from functools import cache
from typing import NamedTuple

VARIABLE = "TIERED_ISA"
_AT_HWCAP, _HWCAP_ASIMDDP = 16, 1 << 20  # of Linux: elf.h, asm/hwcap.h


class Isa(NamedTuple):
    """A set of instructions that kernels are written for.

    `groups` groups of 32 weights are multiplied in one step of a GEMV: their 16-byte halves fill a
    register of `16 * groups` bytes. `panel_rows` rows of weights are interleaved for a GEMM, one
    in each 32-bit lane, and `panels` such panels are multiplied with `panel_tokens` tokens at a
    time, or with `float_tokens` if they are of float32: their sums and weights fill the registers.
    `rows_at_once` rows of weights are decoded for a GEMM before activations pass: their panels stay
    in the L2 cache. `panels_from` rows of activations, or more, are worth panels of weights without
    a GEMM, too (see few_rows.py). `has_tiles`: AMX multiplies prompts instead (see amx.py).
    """

    name: str
    features: tuple[str, ...]
    groups: int
    panel_rows: int
    panels: int
    panel_tokens: int
    float_tokens: int
    rows_at_once: int = 32
    panels_from: int = 2
    has_tiles: bool = False


_VNNI = "avx512f", "avx512bw", "avx512vl", "avx512vnni"

# Best first. The last one needs nothing: plain vector code, lowered to whatever is there.
ISAS: dict[str, Isa] = {
    isa.name: isa
    for isa in (
        Isa("amx_bf16", (*_VNNI, "amx-tile", "amx-bf16"), 4, 16, 2, 7, 8, has_tiles=True),
        Isa("avx512_vnni", _VNNI, 4, 16, 2, 7, 8),
        Isa("avx_vnni", ("avx2", "fma", "f16c", "avxvnni"), 2, 8, 2, 3, 6, panels_from=9),
        Isa("avx2", ("avx2", "fma", "f16c"), 2, 8, 2, 3, 6, panels_from=9),
        Isa("neon_dotprod", ("neon", "dotprod"), 1, 4, 1, 8, 8, panels_from=9),
        Isa("portable", (), 1, 4, 1, 4, 4, panels_from=9),
    )
}


_ARCH_PRCTL, _ASK_PERMISSION, _TILE_DATA = 158, 0x1023, 18  # for ARCH_REQ_XCOMP_PERM


@cache
def amx_refusal() -> str:
    """Why the system does not let this process use AMX; "": all its threads may.

    Linux wants to be asked, as it must then find room for 8 KiB of tiles for each thread
    (https://docs.kernel.org/arch/x86/xstate.html).
    """
    if sys.platform != "linux":
        return f"{sys.platform} is not asked for it"
    system = ctypes.CDLL(None, use_errno=True)
    arguments = [ctypes.c_long(n) for n in (_ARCH_PRCTL, _ASK_PERMISSION, _TILE_DATA)]
    return "" if system.syscall(*arguments) == 0 else os.strerror(ctypes.get_errno())


def processor_features() -> dict[str, bool]:
    """The processor's features under LLVM's names."""
    from llvmlite import binding

    features = dict(binding.get_host_cpu_features())
    if is_arm(binding.get_process_triple()):  # LLVM has some of Linux's there, none of macOS's
        features |= {"neon": True, "dotprod": _has_dot_products()}
    return features


def features_for_llvm() -> str:
    """What a compiler must be told of the processor: "+dotprod,-sve", or "" if LLVM knows it all.

    Without, a processor whose name LLVM does not know would have no dot products for it, and an
    instruction that it cannot place ends the process, too.
    """
    from llvmlite import binding

    features = host_features()
    if features == dict(binding.get_host_cpu_features()):
        return ""
    return ",".join(f"{'+' if features[name] else '-'}{name}" for name in sorted(features))


def is_arm(triple: str) -> bool:
    """Whether LLVM's name of a machine is one of 64-bit ARM."""
    return triple.startswith(("aarch64", "arm64"))


def _has_dot_products() -> bool:
    """Whether this ARM processor has FEAT_DotProd, as far as the system tells."""
    if sys.platform == "darwin":
        value, size = ctypes.c_int32(0), ctypes.c_size_t(4)
        name, places = b"hw.optional.arm.FEAT_DotProd", (ctypes.byref(value), ctypes.byref(size))
        failed = ctypes.CDLL(None).sysctlbyname(name, *places, None, ctypes.c_size_t(0))
        return not failed and value.value == 1
    if sys.platform == "linux":
        read = ctypes.CDLL(None).getauxval
        read.argtypes, read.restype = (ctypes.c_ulong,), ctypes.c_ulong
        return bool(read(_AT_HWCAP) & _HWCAP_ASIMDDP)
    return False


def host_features() -> dict[str, bool]:
    """Those that may be used: AMX's tiles only if the system permits it."""
    features = processor_features()
    if features.get("amx-tile", False) and amx_refusal():
        features["amx-tile"] = False
    return features


@cache
def has_quick_streams() -> bool:
    """Whether lines of memory that are asked for early, to be used once, are there in time.

    Intel's processors have a few places for them: of those that are asked for four KiB early, most
    are gone again, and a row of weights is read at half the speed (Emerald Rapids). AMD's and ARM's
    keep them.
    """
    from llvmlite import binding

    is_x86 = binding.get_process_triple().startswith("x86_64")
    return not is_x86 or binding.get_host_cpu_name().startswith("znver")


def amx_use(isa: Isa) -> str:
    """What AMX multiplies where these instructions were chosen, or why nothing."""
    features = processor_features()
    if isa.has_tiles:
        return "used for prompts, and for all rows of bfloat16 weights"
    if not (features.get("amx-tile", False) and features.get("amx-bf16", False)):
        return "not used: the processor has none for bfloat16"
    if amx_refusal():
        return f"not used: the system refuses it ({amx_refusal()})"
    return f"not used: {isa.name} was asked for"


def usable(features: Mapping[str, bool]) -> list[str]:
    """Names of the instruction sets that a processor with these features has, best first."""
    return [
        isa.name
        for isa in ISAS.values()
        if all(features.get(feature, False) for feature in isa.features)
    ]


def available() -> list[str]:
    """Names of the instruction sets that this processor has, best first."""
    return usable(host_features())


def choose(name: str = "auto", features: Mapping[str, bool] | None = None) -> Isa:
    """The instruction set to use: `name`, or TIERED_ISA, or the best that the processor has.

    Raises ValueError for an unknown name and for one that this processor cannot run.
    """
    names = usable(host_features() if features is None else features)
    if name == "auto":
        name = os.environ.get(VARIABLE, "auto") or "auto"
    if name == "auto":
        name = names[0]
    if name not in ISAS:
        raise ValueError(f"unknown instruction set {name!r}: choose auto or one of {list(ISAS)}")
    if name not in names:
        lacking = [f for f in ISAS[name].features if not (features or host_features()).get(f)]
        raise ValueError(
            f"this processor cannot run {name}: it lacks {', '.join(lacking)}. It can run {names}"
        )
    return ISAS[name]
