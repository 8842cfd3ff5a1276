"""The torch backend on torch's CPU device: against plain NumPy, and as an engine of its own."""

import gc
import sys
import weakref

import numpy as np
import pytest
from instructions import AS_ON_A_GPU
from naive import NaiveBackend

from cpu_kernels.backend import CpuBackend
from tiered import Engine, policies
from tiered.backend import AttentionWeights, Batch
from tiered.config import ModelConfig, RopeConfig
from tiered.demo import random_tiny_model
from tiered.experts import ExpertKey, LayerLayouts, expert_layout
from tiered.gpu.placement import PlacedExperts
from tiered.gpu.splits import Fixed
from tiered.gpu.uploads import MappedBlobs, Uploads
from tiered.planning.costs import Costs
from tiered.policies import Space
from tiered.tier import Tier

torch = pytest.importorskip("torch")
from gpu_backend.backend import GpuBackend  # noqa: E402
from gpu_backend.batch import BatchPlace, SequencePlace  # noqa: E402
from gpu_backend.device import TorchDevice, check_capability  # noqa: E402
from gpu_backend.graphs import Buffers  # noqa: E402
from gpu_backend.kv import KVMemory, KVPages, KVShape, token_bytes  # noqa: E402
from gpu_backend.matrix import Rows  # noqa: E402
from gpu_backend.rope import RopeTable  # noqa: E402

PROMPT = np.random.default_rng(0).integers(3, 256, 21).tolist()
NUM_TOKENS = 12
CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("one_torch_thread")


class GpuEngine:
    """An engine whose VRAM is torch's CPU device; experts of a model that fits come from the map,
    others from a RAM tier."""

    def __init__(self, model, num_slots, share=1.0, host=False, **choices):
        self.backend = GpuBackend("cpu", host=CpuBackend(2) if host else None)
        self.engine = Engine(model, backend=self.backend, look_ahead=0,
                             ram="4G", kv_dtype="f32", **choices)  # fmt: skip
        store, config = self.engine.store, self.engine.config
        nbytes = max(store.blob_bytes)
        space = Space(num_slots * nbytes, tuple(nbytes for _ in store.blob_bytes))
        layouts = {layer: store.layouts(layer) for layer in config.sparse_layers}
        memory = self.backend.slots(space, layouts, config.num_experts)
        below = self.engine.source
        blobs = MappedBlobs(store) if self.engine.plan.mapped else below.tier
        policy = policies.create("layer_lfu", space)
        self.tier = Tier(memory, Uploads(blobs, memory), policy, loaders=3)
        costs = Costs.unknown(nbytes)
        self.engine.decoder.source = PlacedExperts(
            self.tier, below, store, Fixed(share), costs, few_rows=8
        )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.tier.close()
        self.engine.close()


@pytest.fixture(scope="module")
def int4_model(tmp_path_factory):
    return random_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def expected(int4_model):
    with GpuEngine(int4_model, 100) as gpu:
        return list(gpu.engine.generate_tokens(PROMPT, NUM_TOKENS)), gpu.engine.logits(PROMPT)


@pytest.mark.parametrize("num_slots", [2, 5])
def test_logits_are_the_same_bits_whatever_is_resident(int4_model, expected, num_slots):
    tokens, logits = expected
    with GpuEngine(int4_model, num_slots) as gpu:
        assert list(gpu.engine.generate_tokens(PROMPT, NUM_TOKENS)) == tokens
        assert np.array_equal(gpu.engine.logits(PROMPT), logits)
        assert np.array_equal(gpu.engine.logits(PROMPT), logits)


def test_near_the_cpu_engine(int4_model, expected):
    """The same integers, other orders of float additions: an activation may round to the next
    int8 value, which is 1/254 of its group's largest."""
    with Engine(int4_model, threads=2, kv_dtype="f32", isa=AS_ON_A_GPU) as engine:
        logits = engine.logits(PROMPT)
    assert np.abs(expected[1] - logits).max() <= 2e-2 * np.ptp(logits)


@pytest.mark.parametrize("num_slots", [2, 6])
@pytest.mark.parametrize("share", [0.0, 0.5])
def test_misses_on_the_cpu_change_no_bit(int4_model, share, num_slots):
    """The CPU computes up to eight rows as the GPU does; chunks of three tokens stay below."""
    with GpuEngine(int4_model, 100, prefill_chunk=3) as gpu:
        logits = gpu.engine.logits(PROMPT)
    with GpuEngine(int4_model, num_slots, share, host=True, prefill_chunk=3) as gpu:
        for _ in range(2):  # another cache state the second time
            assert np.array_equal(gpu.engine.logits(PROMPT), logits)
        assert gpu.engine.decoder.source.computed_in_ram > 0


def test_an_expert_in_ram_needs_a_host(int4_model):
    with (
        GpuEngine(int4_model, 5, share=0.0) as gpu,
        pytest.raises(RuntimeError, match="no host backend"),
    ):
        list(gpu.engine.generate_tokens([5], 2))


def test_attention_agrees_with_plain_numpy():
    """Grouped heads, a sliding window, two sequences in one batch, every kind of rope."""
    rng = np.random.default_rng(2)
    for pairs, window, norm, clip in (
        ("half", 0, "", 0.0), ("adjacent", 5, "head", 0.0), ("half", 3, "full", 0.5),
    ):  # fmt: skip
        config = ModelConfig(
            "test", 1, 96, 10, 64, 4, 2, 16, 1e-5, RopeConfig(dim=8, pairs=pairs, magnitude=1.1),
            qk_norm=norm, clip_qkv=clip, sliding_window=window,
        )  # fmt: skip
        backends = NaiveBackend(), GpuBackend("cpu")
        norms = {"": (None, None), "head": (16, 16), "full": (64, 32)}[norm]
        norms = [None if n is None else rng.uniform(0.5, 1.5, n).astype("f4") for n in norms]
        norm_weight = rng.uniform(0.5, 1.5, 96).astype(np.float32)
        datas = [rng.standard_normal(s).astype("f4") / 8 for s in
                 ((64, 96), (32, 96), (32, 96), (96, 64))]  # fmt: skip
        table = rng.standard_normal((10, 96)).astype("f4")
        results = []
        for backend in backends:
            matrices = [backend.matrix(d.view(np.uint8).reshape(-1), "f32", d.shape) for d in datas]
            weights = AttentionWeights(norm_weight, *matrices, *norms)
            layer = backend.attention_layer(weights, config)
            embedding = backend.matrix(table.view(np.uint8).reshape(-1), "f32", table.shape)
            kv = backend.kv_pages(config, 3, 16, "f32")
            tables = np.array([[2, 1], [0, -1]], np.int32)
            positions = np.arange(17, dtype=np.int32)
            first = Batch(positions % 10, positions, np.zeros(17, np.int32), tables)
            second = Batch(
                np.array([3, 4, 5], np.int32), np.array([17, 0, 1], np.int32),
                np.array([0, 1, 1], np.int32), tables,
            )  # fmt: skip
            for batch in (first, second):
                x = backend.embed(embedding, batch.tokens)
                backend.attention(x, layer, kv, 0, batch)
                results.append(np.asarray(x))
        for want, got in zip(results[:2], results[2:], strict=True):
            assert np.abs(got - want).max() <= 1e-5 * np.abs(want).max()


@pytest.mark.parametrize(("dtype", "tolerance"), [("f16", 1e-3), ("int8", 1 / 200), ("f32", 0)])
def test_kv_pages_keep_what_they_are_given(dtype, tolerance):
    shapes = dict.fromkeys(range(2), KVShape(3, 8, 8))
    memory = torch.zeros(64 * token_bytes(shapes.values(), dtype), dtype=torch.uint8)
    pages = KVPages(shapes, 4, 16, dtype, [KVMemory(memory, [0, 1])])
    keys, values = torch.randn(2, 5, 3, 8, generator=torch.Generator().manual_seed(0))
    at = torch.tensor([3, 17, 18, 40, 63])
    pages.append(1, at, keys, values)
    for got, want in ((pages.keys(1, at), keys), (pages.values(1, at), values)):
        assert (got - want).abs().max() <= tolerance * want.abs().max()
    assert pages.keys(0, at).abs().max() == 0
    # Each layer's part of a token is in whole 16 bytes.
    part = {"f32": 192, "f16": 96, "int8": 2 * 3 * 8 + 2 * 3 * 4 + 8}[dtype]
    assert pages.nbytes == 64 * 2 * part
    assert not memory.reshape(64, 2, part)[:, 0].any()


def test_kv_pages_of_unknown_type_are_refused():
    with pytest.raises(ValueError, match="f32, f16 or int8"):
        KVPages({}, 1, 16, "f8", [])


def test_what_is_visible():
    place = SequencePlace(np.arange(2), np.array([2, 3]), np.array([5, 6, 7, 9]), CPU)
    slots, mask = place.visible()
    assert slots.tolist() == [5, 6, 7, 9]
    assert mask.tolist() == [[True, True, True, False], [True] * 4]
    slots, mask = place.visible(2)
    assert slots.tolist() == [6, 7, 9]
    assert mask.tolist() == [[True, True, False], [False, True, True]]
    slots, mask = place.visible(3, chunked=True)  # chunks 0 to 2 and 3 to 5
    assert slots.tolist() == [5, 6, 7, 9]
    assert mask.tolist() == [[True, True, True, False], [False, False, False, True]]
    last = SequencePlace(np.arange(1), np.array([3]), np.array([5, 6, 7, 9]), CPU)
    for window, chunked, expected in (
        (0, False, [5, 6, 7, 9]), (4, False, [5, 6, 7, 9]), (1, False, [9]), (2, True, [7, 9]),
    ):  # fmt: skip
        slots, mask = last.visible(window, chunked)
        assert slots.tolist() == expected and mask is None


def test_batch_places_are_pages():
    batch = Batch(np.zeros(2, np.int32), np.array([15, 16], np.int32), np.zeros(2, np.int32),
                  np.array([[3, 1]], np.int32))  # fmt: skip
    pages = KVPages({}, 4, 16, "f16", [])  # of which page 0 comes last
    place = BatchPlace(batch, pages, CPU, Buffers(CPU))
    assert place.slots.tolist() == [15, 32]
    assert place.sequences[0].visible()[0].tolist() == [*range(16), 32]


def test_rope_needs_an_even_dimension():
    with pytest.raises(ValueError, match="even"):
        RopeTable(RopeConfig(dim=7), 16)


def test_slots_hold_planes_and_the_table_says_where():
    layout = expert_layout(64, 32, "q4_0", "q8_0", "q4_1")
    backend = GpuBackend("cpu")
    memory = backend.slots(
        Space(3 * layout.nbytes, (0, layout.nbytes)), {1: LayerLayouts.of([layout] * 4)}, 4
    )
    memory.try_out()
    assert (memory.table == -1).all()
    blob = np.random.default_rng(0).integers(0, 256, layout.nbytes, np.uint8)
    with memory.staging() as staging:
        staging.host[:] = blob
        memory.upload(ExpertKey(1, 2), 0, staging.host, staging)
        memory.upload(ExpertKey(1, 3), 2, staging.host, staging)
        memory.upload(ExpertKey(1, 0), 0, staging.host, staging)
    assert memory.table[1].tolist() == [0, -1, -1, 2]
    gate = memory.slab[: layout.gate.nbytes].numpy()
    source = blob[: layout.gate.nbytes].reshape(-1, 18)
    assert (gate == np.concatenate([source[:, 2:].ravel(), source[:, :2].ravel()])).all()


def test_a_missing_device_is_an_error_that_says_what_to_do():
    if torch.cuda.is_available():
        pytest.skip("this machine has one")
    with pytest.raises(RuntimeError, match="no CUDA device"):
        GpuBackend("cuda")


def test_wrong_matrices_are_refused():
    backend = GpuBackend("cpu")
    with pytest.raises(ValueError, match="only 10 are there"):
        backend.matrix(np.zeros(10, np.uint8), "q4_0", (2, 32))
    with pytest.raises(ValueError, match="no GPU kernel knows the number format 'q9_9'"):
        backend.matrix(np.zeros(100, np.uint8), "q9_9", (2, 32))


def test_memory_errors_say_for_what():
    device = TorchDevice("cpu")
    with pytest.raises(MemoryError, match="the KV cache"), device.allocating("the KV cache"):
        raise torch.OutOfMemoryError("no")


def test_without_triton_it_says_what_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "gpu_backend.launch", None)  # as on Windows: ImportError
    monkeypatch.setattr("gpu_backend.backend._interpreted", lambda: True)
    with pytest.raises(
        RuntimeError, match=r"need triton.*pip install 'tiered\[gpu\]'.*--device cpu"
    ):
        GpuBackend("cpu")


def test_kernels_that_do_not_run_say_what_they_need():
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    from gpu_backend.launch import Launcher

    with pytest.raises(RuntimeError, match=r"cannot run its kernels on cpu .*gcc python3-dev"):
        Launcher().try_out(CPU)


def test_cards_that_are_too_old_are_refused():
    check_capability("cuda:0", (7, 5))
    with pytest.raises(RuntimeError, match=r"cuda:0 has compute capability 6\.1.*--device cpu"):
        check_capability("cuda:0", (6, 1))


def test_a_closed_engine_leaves_no_memory_behind(int4_model):
    """Also before Python looks for cycles: the next engine counts what is free."""
    gc.collect()
    gc.disable()
    try:
        with Engine(int4_model, device="sim", threads=1) as engine:
            list(engine.generate_tokens([5], 2))
            slab = weakref.ref(engine.backend.cards[0]._slots.slab)
        del engine
        assert slab() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("format", ["f16", "bf16", "f32"])
def test_floats_are_widened_a_part_at_a_time(format, monkeypatch):
    """A head of 150000 tokens in 16 bits would take more in 32 than what budgets leave free."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 64, generator=generator)
    kind = {"f16": torch.float16, "bf16": torch.bfloat16, "f32": torch.float32}[format]
    weights = torch.randn(50, 64, generator=generator).to(kind)
    widest, whole = [], torch.nn.functional.linear

    def linear(rows, part):
        widest.append(len(part))
        return whole(rows, part)

    monkeypatch.setattr("gpu_backend.matrix.WIDENED", 7 * 64)
    monkeypatch.setattr(torch.nn.functional, "linear", linear)
    data = weights.view(torch.uint8).numpy()
    matrix = GpuBackend("cpu").matrix(data, format, (50, 64))
    got = matrix.multiply(Rows(x, None))
    assert torch.allclose(got, x @ weights.float().T, rtol=1e-5, atol=1e-5)
    assert max(widest) == (50 if format == "f32" else 7)
