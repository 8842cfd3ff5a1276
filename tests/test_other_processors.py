"""Machine code for processors that this one is not: compiled and looked at, never run."""

import llvmlite.binding as llvm
import pytest
from llvmlite import ir
from numba import njit, types

from cpu_kernels import amx, few_rows, gemm, gemv
from cpu_kernels.atomic import atomic_add, atomic_exchange, atomic_load, atomic_store
from cpu_kernels.groups import LAYOUTS
from cpu_kernels.isa import ISAS
from cpu_kernels.simd import Emitter, Value, f32

I64 = ir.IntType(64)
TILES = "tdpbf16ps", "tmm"  # instruction and registers of prompts, where there are tiles
PROCESSORS = {
    "amx_bf16": ("x86_64-unknown-linux-gnu", "sapphirerapids", "vpdpbusd", "zmm"),
    "avx512_vnni": ("x86_64-unknown-linux-gnu", "icelake-server", "vpdpbusd", "zmm"),
    "avx_vnni": ("x86_64-unknown-linux-gnu", "alderlake", "vpdpbusd", "ymm"),
    "avx2": ("x86_64-unknown-linux-gnu", "haswell", "vpmaddubsw", "ymm"),
    "neon_dotprod": ("aarch64-unknown-linux-gnu", "neoverse-n1", "sdot", "v0."),
}


def compiled_for(code, triple, cpu):
    """Assembly of LLVM's `code` for that processor."""
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    machine = llvm.Target.from_triple(triple).create_target_machine(cpu=cpu, opt=3)
    compiled = llvm.parse_assembly(code)
    options = llvm.create_pipeline_tuning_options(speed_level=3)
    builder = llvm.create_pass_builder(machine, options)
    builder.getModulePassManager().run(compiled, builder)
    return machine.emit_assembly(compiled)


def assembly(write, num_values, triple, cpu):
    """Assembly of a function of int64 arguments whose body is written by write(k, *values)."""
    module = ir.Module()
    module.triple = triple
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [I64] * num_values), "kernel")
    builder = ir.IRBuilder(function.append_basic_block("entry"))
    emitter = Emitter(builder)
    write(emitter, *[Value(emitter, argument) for argument in function.args])
    builder.ret_void()
    return compiled_for(str(module), triple, cpu)


@pytest.mark.parametrize("isa", PROCESSORS)
@pytest.mark.parametrize("format", LAYOUTS)
def test_kernels_use_the_instruction_they_are_for(isa, format):
    triple, cpu, instruction, register = PROCESSORS[isa]

    def one(k, weights, num_groups, x, y):
        k.store(y, gemv.dot_quantized.write(k, isa, format, weights, num_groups, x))

    def many(k, panel, num_chunks, sources, tile):
        gemm.multiply_panels.write(k, isa, format, panel, num_chunks, sources, tile)

    def tiles(k, *values):
        amx.multiply_and_decode.write(k, isa, format, *values)

    def few(k, weights, num_groups, sources, num_rows, targets, offset):
        added = k.constant(f32(1), 0.0)
        rows = weights, num_groups, sources, num_rows
        gemv.dot_few_quantized.write(k, isa, format, *rows, added, targets, offset)

    def several(k, *values):
        few_rows.multiply_few.write(k, isa, format, *values)

    last = (tiles, 12) if ISAS[isa].has_tiles else (many, 4)
    for write, num_values in ((one, 4), (few, 6), (several, 8), last):
        if write is tiles:
            instruction, register = TILES
        try:
            text = assembly(write, num_values, triple, cpu)
        except RuntimeError as error:  # this LLVM was built without that target
            pytest.skip(str(error))
        lines = [line for line in text.splitlines() if instruction in line]
        assert lines and all(register[0] in line for line in lines)
        if register.endswith("mm"):
            assert any(register in line for line in lines)


@pytest.mark.parametrize(
    ("cpu", "instructions"),
    [
        ("neoverse-n1", ("ldar", "stlr", "ldaddal", "swpal")),
        ("cortex-a72", ("ldar", "stlr", "ldaxr", "stlxr")),
    ],
)
def test_words_of_a_team_are_acquired_and_released(cpu, instructions):
    """ARM may change the order of other reads and writes, which x86 keeps: tests that run here
    would not notice."""

    def use(address):
        old = atomic_exchange(address + 16, atomic_load(address + 24))
        atomic_store(address, atomic_add(address + 8, old))

    code = njit(use)
    code.compile((types.int64,))
    triple, lines = PROCESSORS["neon_dotprod"][0], []
    for line in code.inspect_llvm(code.signatures[0]).splitlines():
        lines.append(f'target triple = "{triple}"' if line.startswith("target triple") else line)
    try:
        text = compiled_for("\n".join(lines), triple, cpu)
    except RuntimeError as error:  # this LLVM was built without that target
        pytest.skip(str(error))
    words = text.split()
    assert all(instruction in words for instruction in instructions)
    assert not {"ldadd", "ldadda", "ldaddl", "swp", "swpa", "swpl", "ldxr", "stxr"} & set(words)
