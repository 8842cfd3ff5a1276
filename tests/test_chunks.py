"""Chunks of a prompt share fetched experts, and say what they would say one after the other."""

import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from tiered import Engine
from tiered.budget import LONGEST_PASS, plan_memory
from tiered.chunks import jobs_by_chunk
from tiered.demo import random_tiny_model
from tiered.experts import Routing, group_by_expert

MiB = 1 << 20
CHUNK = 40  # so that some experts get few rows of a chunk, and others many
PROMPT = np.random.default_rng(0).integers(3, 256, 3 * CHUNK + 5).tolist()
RECURRENT = "qwen3_next", "granitemoehybrid", "lfm2_moe"
KINDS = "qwen3_moe", "gemma4", "llama4", "deepseek_v3", "gpt_oss", "phimoe", "llama", *RECURRENT


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return random_tiny_model(tmp_path_factory.mktemp("model"))


def after_prompt(engine, pass_tokens):
    """Logits after the prompt, and the tokens that follow."""
    engine.generation.pass_tokens = pass_tokens
    sequence = engine.kv.open()
    logits = engine.generation.begin(sequence, PROMPT)
    engine.kv.close(sequence)
    return logits, list(engine.generate_tokens(PROMPT, 6))


def check_same(engine):
    logits, tokens = after_prompt(engine, CHUNK)
    for chunks in (2, 10):
        got, following = after_prompt(engine, chunks * CHUNK)
        assert np.array_equal(got, logits), chunks
        assert following == tokens, chunks


@pytest.mark.parametrize("kind", KINDS)
def test_a_pass_of_several_chunks_has_the_same_bits(tmp_path, kind):
    """Of every kind of layer: experts that are shared, dense, merged, weighted before, biased."""
    folder = tiny.hf_checkpoint(tmp_path, kind)
    with Engine(folder, prefill_chunk=CHUNK, threads=2) as engine:
        check_same(engine)


@pytest.mark.parametrize(
    "choices",
    [dict(threads=1), dict(kv_dtype="int8"), dict(look_ahead=0), dict(expert_top_p=0.8),
     dict(quantize="none")],
    ids=str,
)  # fmt: skip
def test_with_little_memory_too(model, choices):
    with Engine(model, prefill_chunk=CHUNK, expert_ram="200k", **choices) as engine:
        assert not engine.plan.mapped
        check_same(engine)


@pytest.mark.parametrize("vram", ["1500k", None])
def test_beside_a_gpu_too(model, vram):
    """A described one, which copies and computes at once with the processor."""
    card = dict(device="sim:rtx4060ti-16gb", vram=vram, context=256)
    with Engine(model, prefill_chunk=CHUNK, expert_ram="200k", **card) as engine:
        assert (engine.generation.pass_tokens > CHUNK) == (vram is None)
        check_same(engine)


def test_a_pass_reads_each_expert_once(model):
    with Engine(model, prefill_chunk=CHUNK, expert_ram="200k", look_ahead=0) as engine:
        layers, experts = len(engine.config.sparse_layers), engine.config.num_experts
        misses = []
        for chunks in (1, 10):
            engine.generation.pass_tokens = chunks * CHUNK
            before, sequence = engine.stats.misses, engine.kv.open()
            engine.generation.begin(sequence, PROMPT)
            engine.kv.close(sequence)
            misses.append(engine.stats.misses - before)
    assert misses[1] <= layers * experts < misses[0]


@settings(deadline=None)
@given(
    st.integers(1, 90), st.integers(1, 3), st.integers(1, 50), st.integers(1, 20), st.integers(0, 9)
)
def test_jobs_by_chunk(num_tokens, top_k, size, few_rows, seed):
    """Every pair once and with its expert; few rows of a chunk, and those alone, by themselves."""
    rng = np.random.default_rng(seed)
    experts = np.argsort(rng.random((num_tokens, 5)) ** 3)[:, :top_k].astype(np.int32)
    jobs = group_by_expert(Routing(experts, np.ones(experts.shape, np.float32)))
    addresses = jobs.experts[:, None] * np.array([10, 100, 1000], np.int64)
    pairs = []
    for some, at in jobs_by_chunk(jobs, addresses, top_k, size, few_rows):
        assert some.starts.dtype == some.pairs.dtype == some.experts.dtype == np.int32
        assert some.starts[0] == 0 and some.starts[-1] == len(some.pairs)
        assert len(some.pairs) <= max(top_k * size, 4 * few_rows)
        assert np.array_equal(at, some.experts[:, None] * np.array([10, 100, 1000]))
        for i, expert in enumerate(some.experts):
            own = some.pairs[some.starts[i] : some.starts[i + 1]]
            assert np.all(experts.reshape(-1)[own] == expert)
            chunks = own // top_k // size
            together = {c: np.sum(experts[c * size : (c + 1) * size] == expert) for c in chunks}
            if len(own) <= few_rows:
                assert len(together) == 1 and together[chunks[0]] == len(own)
            else:
                assert min(together.values()) > few_rows
            pairs += own.tolist()
    assert sorted(pairs) == list(range(num_tokens * top_k))


def plan(limit, experts=1000 * MiB, mappable=True, **changed):
    sizes = dict(process=50 * MiB, dense=50 * MiB, kv=0, workspace=10 * MiB, floor=10 * MiB)
    return plan_memory(
        limit=limit, expert_ram=None, experts=experts, mappable=mappable, chunk=512,
        longest_pass=LONGEST_PASS, pass_bytes=MiB // 64, **sizes | changed,
    )  # fmt: skip


def test_memory_for_passes():
    """Spare memory, or a small part of the slots; a model that fits goes on to fit."""
    assert plan(4000 * MiB).pass_tokens == LONGEST_PASS
    fits = plan(1110 * MiB)
    assert fits.mapped and fits.pass_tokens == 512 and fits.slots == 1000 * MiB
    half = plan(610 * MiB)  # a 32nd of 500 MiB are 15, one more chunk takes 8
    assert not half.mapped and (half.pass_tokens, half.slots) == (1024, 492 * MiB)
    assert plan(910 * MiB).pass_tokens == 4 * 512
    for limit in range(121, 1300, 7):
        shared = plan(limit * MiB)
        assert shared.fixed + shared.slots <= limit * MiB
        assert shared.slots >= 10 * MiB
        assert shared.pass_tokens % 512 == 0
    assert plan(4000 * MiB, experts=0, floor=0).pass_tokens == 512  # nothing to share
