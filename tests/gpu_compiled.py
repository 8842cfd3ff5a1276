"""Compiles the Triton kernels for GPUs that are not here, and prints what became of them, as JSON.

    python tests/gpu_compiled.py 86,120 q4_0,q4_k

A process of its own: the interpreter that other tests use must not be on. Shapes are Mixtral's
and, of MXFP4, gpt-oss's.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

sys.path.insert(0, str(Path(__file__).parent.parent))
from gpu_backend.kernels import activations, experts, gemm, linear, rearrange
from gpu_backend.launch import EXACT
from gpu_backend.tuning import Tuning

TUNING = Tuning()
HIDDEN, SIZE = 4096, 14336
TYPES = {
    "i8": "values", "u8": "base slab blocks planes", "i64": "starts tile_starts",
    "i32": "tokens targets owners tile_owners tile_first tile_count",
    "fp32": "x_factors biases y out factors weights",
}  # fmt: skip
POINTERS = {name: f"*{kind}" for kind, names in TYPES.items() for name in names.split()}
SCALARS = "plane GATE_AT UP_AT DOWN_AT AT num_blocks G H"
# What torch allocates, and every offset in a blob, is a multiple of 16 bytes.
ALIGNED = {*POINTERS, "x", "plane", "GATE_AT", "UP_AT", "DOWN_AT", "AT", "H"}


def compile_kernel(kernel, arch, x, **constants):
    names = kernel.arg_names
    signature = {
        name: "constexpr" if name in constants else
        x if name == "x" else POINTERS.get(name) or ("i32" if name in SCALARS.split() else None)
        for name in names
    }  # fmt: skip
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(n),): [["tt.divisibility", 16]] for n in ALIGNED & {*names}
               if n not in constants},
    )  # fmt: skip
    options = {"num_warps": TUNING.warps, **EXACT}
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def facts(compiled):
    """Widest loads, registers, bytes of stack (spilled registers), matrix instructions."""
    ptx = compiled.asm["ptx"]
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [str(tool), "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True)
    found = dict(re.findall(r"(REG|STACK):(\d+)", usage.stdout + usage.stderr))
    return {
        "wide_loads": len(re.findall(r"ld\.global[\w.:]*\.v4\.b32", ptx)),
        "dot_products": len(re.findall(r"dp4a", ptx)),
        "matrix_products": len(re.findall(r"\bmma\.sync", ptx)),
        "registers": int(found["REG"]),
        "stack": int(found["STACK"]),
        "fused": len(re.findall(r"fma\.rn\.f32", ptx)),
    }


def compile_format(arch, format):
    rows = dict(ROWS=TUNING.rows, EMULATE=False)
    tiles = dict(TOKENS=TUNING.tile_tokens, ROWS=TUNING.tile_rows, FLOAT_DOT=arch < 80)
    tiles["EMULATE"] = False
    # MXFP4 is gpt-oss's: biases, another activation, and rows that end within a chunk.
    biased = format == "mxfp4"
    hidden, size = (2880, 2880) if biased else (HIDDEN, SIZE)
    gate_up = dict(N=size, K=hidden, GATE=format, UP=format, BIASED=biased, LIMIT=7.0)
    gate_up["ACTIVATION"] = "clamped_silu" if biased else "silu"
    down = dict(N=hidden, K=size, FORMAT=format, BIASED=biased)
    kernels = {
        "linear": (linear.linear_kernel, "*i32", dict(N=hidden, K=hidden, FORMAT=format, **rows)),
        "gate_up": (experts.gate_up_kernel, "*i32", {**gate_up, **rows}),
        "down": (experts.down_kernel, "*i32", {**down, **rows}),
        "grouped_gate_up": (gemm.grouped_gate_up_kernel, "*i8", {**gate_up, **tiles}),
        "grouped_linear": (gemm.grouped_linear_kernel, "*i8", {**down, **tiles}),
    }
    return {name: facts(compile_kernel(k, arch, x, **c)) for name, (k, x, c) in kernels.items()}


def compile_rest(arch):
    quantize = dict(GROUPS=64)
    combine = dict(TOP_K=2, WIDTH=1024, EMULATE=False)
    plane = dict(OFFSET=2, NBYTES=16, BLOCK_BYTES=18, WIDTH=TUNING.copy_width)
    return {
        "quantize": facts(compile_kernel(activations.quantize_kernel, arch, "*fp32", **quantize)),
        "combine": facts(compile_kernel(experts.combine_kernel, arch, "*fp32", **combine)),
        "plane": facts(compile_kernel(rearrange.plane_kernel, arch, "*u8", **plane)),
    }


if __name__ == "__main__":
    result = {}
    for arch in map(int, sys.argv[1].split(",")):
        result[f"sm_{arch}"] = {f: compile_format(arch, f) for f in sys.argv[2].split(",")}
        result[f"sm_{arch}"]["any"] = compile_rest(arch)
    print(json.dumps(result))
