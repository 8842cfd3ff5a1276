"""Kernels compile for every generation of NVIDIA GPUs, to the instructions they should have."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("triton")

TESTS = Path(__file__).parent
DECODE = "linear", "gate_up", "down"
PREFILL = "grouped_gate_up", "grouped_linear"


def compiled(cache, archs, formats):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, str(TESTS / "gpu_compiled.py"), archs, formats],
        env={**environment, "TRITON_CACHE_DIR": str(cache)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout)


def check(kernels, arch):
    for name in DECODE:
        facts = kernels[name]
        assert facts["wide_loads"] >= 3, (arch, name, facts)  # weights, and activations twice
        assert facts["dot_products"] > 0 and facts["matrix_products"] == 0
        # Where a thread may have 64 registers, a few values are kept elsewhere.
        assert facts["stack"] <= (16 if arch == "sm_75" else 0), (arch, name, facts)
        assert facts["registers"] <= 96, (arch, name, facts)  # five blocks of 128 threads
    for name in PREFILL:
        facts = kernels[name]
        # Triton drives the matrix units of sm_75 with neither int8 nor, any more, float16.
        assert (facts["matrix_products"] > 0) == (arch != "sm_75"), (arch, name, facts)
        assert facts["stack"] <= 64, (arch, name, facts)


def test_one_architecture(tmp_path):
    kernels = compiled(tmp_path, "86", "mxfp4")["sm_86"]
    check(kernels["mxfp4"], "sm_86")
    assert kernels["any"]["combine"]["fused"] == 0  # see gpu_backend.launch.EXACT


@pytest.mark.slow
@pytest.mark.parametrize(
    ("archs", "formats"),
    [
        ("75,80,86", "q4_0,q4_k,mxfp4"),
        ("89,90,120", "q4_0,q4_k,mxfp4"),
        ("86", "q4_1,q8_0,q5_0,q5_1,q2_k,q3_k,q5_k,q6_k,iq4_nl,iq4_xs,int4_g128,nf4"),
    ],
)
def test_all_architectures(tmp_path, archs, formats):
    for arch, by_format in compiled(tmp_path, archs, formats).items():
        for format in formats.split(","):
            check(by_format[format], arch)
