"""CPU and GPU compute the same bits: what is cached where cannot change what a model says."""

import numpy as np
import pytest
from naive_formats import random_matrix

from cpu_kernels.backend import CpuBackend
from cpu_kernels.dot import as_on_a_gpu, wants_unsigned
from cpu_kernels.formats import FORMATS
from cpu_kernels.groups import LAYOUTS
from cpu_kernels.isa import ISAS, available
from cpu_kernels.linear import FEW_ROWS
from tiered.backend import ExpertBiases
from tiered.config import ModelConfig
from tiered.experts import (
    ExpertKey,
    LayerLayouts,
    Routing,
    expert_layout,
    group_by_expert,
    prepared,
)
from tiered.policies import Space

torch = pytest.importorskip("torch")
from gpu_backend.backend import GpuBackend  # noqa: E402
from gpu_backend.formats import LAYOUTS as GPU_LAYOUTS  # noqa: E402

NUM_EXPERTS = 4
EXPERTS = [
    ("q4_0", "q4_0", "q4_0"),
    ("q4_1", "q8_0", "q4_1"),
    ("q4_k", "q4_k", "q6_k"),
    ("q5_k", "q6_k", "q5_k"),
    ("q5_0", "iq4_nl", "q5_1"),
    ("q2_k", "q3_k", "iq4_xs"),
    ("mxfp4", "mxfp4", "mxfp4"),
    ("int4_g128", "nf4", "int4_g128"),
]
SIGNED = {"q8_0", "iq4_nl", "iq4_xs", "nf4"}
ACTIVATIONS = {"mxfp4": "clamped_silu", "q4_0": "gelu_tanh"}  # of formats; others: silu
MIX = EXPERTS[0], EXPERTS[1], EXPERTS[4], EXPERTS[0]  # an expert each


def experts_of(layouts, hidden, size, isa, num_tokens, activation="silu"):
    """What a CPU and a GPU make of the same experts: float32 [2 * num_tokens, hidden] each."""
    rng = np.random.default_rng(0)
    config = ModelConfig("test", 1, hidden, 10, 64, 4, 2, 16, 1e-5, num_experts=NUM_EXPERTS,
                         top_k=2, expert_size=size, activation=activation,
                         activation_limit=0.7)  # fmt: skip
    biases = None
    if activation == "clamped_silu":  # as in gpt-oss
        rows = [rng.standard_normal((NUM_EXPERTS, n), np.float32) for n in (size, size, hidden)]
        biases = ExpertBiases(*rows)
    largest = max(layouts.blob_bytes)
    blobs = np.zeros((NUM_EXPERTS, largest), np.uint8)
    for expert, blob in enumerate(blobs):
        for tensor in layouts.layout(expert):
            data = random_matrix(rng, tensor.format, tensor.shape, 0.01).reshape(-1)
            blob[tensor.offset : tensor.offset + tensor.nbytes] = data
    h = rng.standard_normal((num_tokens, hidden)).astype(np.float32)
    chosen = np.stack([rng.permutation(NUM_EXPERTS)[:2] for _ in range(num_tokens)])
    routing = Routing(chosen.astype(np.int32), np.ones(chosen.shape, np.float32))
    jobs = group_by_expert(routing)
    offsets = layouts.offsets[jobs.experts]

    cpu, expected = (
        CpuBackend(2, isa, beside_gpu=True),
        np.zeros((2 * num_tokens, hidden), np.float32),
    )
    in_ram = np.array([blobs[e].ctypes.data for e in jobs.experts])[:, None] + offsets
    cpu.experts(h, prepared(cpu, layouts, config, biases), in_ram, jobs, expected)
    cpu.close()

    gpu, got = GpuBackend("cpu"), torch.zeros(2 * num_tokens, hidden)
    space = Space(NUM_EXPERTS * largest, (largest,))
    memory = gpu.slots(space, {0: layouts}, NUM_EXPERTS)
    for expert, blob in enumerate(blobs):
        with memory.staging() as staging:
            staging.host[:] = blob
            memory.upload(ExpertKey(0, expert), expert, staging.host, staging)
    in_slots = np.array([memory.place(int(e)) for e in jobs.experts])[:, None] + offsets
    gpu.experts(torch.from_numpy(h), prepared(gpu, layouts, config, biases), in_slots, jobs, got)
    return expected, got.numpy()


@pytest.mark.parametrize("isa", available())
@pytest.mark.parametrize("formats", EXPERTS, ids="-".join)
@pytest.mark.parametrize("num_tokens", [1, 3, FEW_ROWS])
def test_experts(formats, isa, num_tokens):
    # One chunk is incomplete where the format allows it.
    whole = max(FORMATS[format].block_size for format in formats)
    hidden, size = {32: (416, 96), 128: (384, 128), 256: (512, 256)}[whole]
    layouts = LayerLayouts.of([expert_layout(hidden, size, *formats)] * NUM_EXPERTS)
    activation = ACTIVATIONS.get(formats[0], "silu")
    expected, got = experts_of(layouts, hidden, size, isa, num_tokens, activation)
    assert np.array_equal(got, expected)


@pytest.mark.parametrize("isa", available())
@pytest.mark.parametrize("num_tokens", [1, FEW_ROWS])
def test_a_mix_of_experts(isa, num_tokens):
    layouts = LayerLayouts.of([expert_layout(416, 96, *formats) for formats in MIX])
    assert len(layouts.distinct) == 3
    expected, got = experts_of(layouts, 416, 96, isa, num_tokens)
    assert np.array_equal(got, expected)


def test_signed_weights_are_multiplied_as_on_a_gpu():
    """Where signed weights get 128 added before, which is taken off in float32 afterwards, bits
    differ, and with AMX; processors that do so have AVX2, too, and AVX-512 VNNI."""
    signed = {format for format, layout in LAYOUTS.items() if layout.signed}
    assert signed == SIGNED == {name for name, layout in GPU_LAYOUTS.items() if layout.signed}
    for isa in ISAS.values():
        for format in (*LAYOUTS, "f16"):
            same = ISAS["avx512_vnni"] if isa.has_tiles else isa
            changes = wants_unsigned(isa.name) and format in SIGNED
            assert as_on_a_gpu(isa, format) is (ISAS["avx2"] if changes else same)
