"""The whole engine on a tiny model: what is in memory must not change what the model says."""

import os
import threading

import numpy as np
import pytest
import tiny
from naive import NaiveBackend

from cpu_kernels.formats import FORMATS
from cpu_kernels.isa import ISAS
from tiered import Engine, policies
from tiered.demo import random_tiny_model
from tiered.governor import Governors
from tiered.tracing.replay import replay
from tiered.tracing.trace import read_trace
from tiered.weights.convert import convert

PROMPT = np.random.default_rng(0).integers(3, 256, 21).tolist()
NUM_TOKENS = 24


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return random_tiny_model(tmp_path_factory.mktemp("model"))


def generate(model, num_tokens=NUM_TOKENS, prompt=PROMPT, **choices):
    choices.setdefault("threads", 2)
    with Engine(model, **choices) as engine:
        return list(engine.generate_tokens(prompt, num_tokens)), engine.stats


@pytest.fixture(scope="module")
def expected(model):
    """The tokens with every expert resident; and one layer's top_k experts, and all, in bytes."""
    with Engine(model, threads=1, look_ahead=0) as engine:
        floor = max(engine.store.blob_bytes) * engine.config.top_k
        tokens = list(engine.generate_tokens(PROMPT, NUM_TOKENS))
        logits = engine.logits(PROMPT)
        return tokens, floor, engine.plan.experts, logits


ONLINE = policies.online()


@pytest.mark.parametrize("policy", ONLINE)
def test_policies_and_budgets_never_change_the_tokens(model, expected, policy):
    tokens, floor, experts, _ = expected
    for expert_ram in (floor, experts // 3, experts):
        got, stats = generate(model, policy=policy, expert_ram=expert_ram)
        assert got == tokens, (policy, expert_ram)
        assert stats.misses > 0


@pytest.mark.parametrize(
    "choices",
    [dict(look_ahead=0), dict(look_ahead=3), dict(threads=1), dict(threads=3), dict(readers=1),
     dict(readers=8), dict(ram="4G")],
    ids=str,
)  # fmt: skip
def test_other_choices_never_change_the_tokens(model, expected, choices):
    tokens, _, experts, _ = expected
    got, _ = generate(model, expert_ram=experts // 2, **choices)
    assert got == tokens


def test_logits_are_the_same_bits_whatever_is_resident(model, expected):
    _, floor, _, logits = expected
    with Engine(model, expert_ram=floor, threads=2) as engine:
        assert np.array_equal(engine.logits(PROMPT), logits)


def test_mapped_and_tiered_are_the_same_bits(model):
    """quantize="none" computes from the memory map if all fits, and from slots if not."""
    with Engine(model, quantize="none", threads=2) as engine:
        assert engine.plan.mapped
        mapped = engine.logits(PROMPT)
        budget = engine.plan.experts // 2
    with Engine(model, quantize="none", threads=2, expert_ram=budget) as engine:
        assert not engine.plan.mapped
        assert np.array_equal(engine.logits(PROMPT), mapped)


@pytest.mark.parametrize("chunk", [1, 3, 8, 16])
def test_prefill_in_pieces_agrees(model, expected, chunk):
    """Within what rounding an activation to the other int8 value can do, or where there is AMX, of
    more than a few rows to bfloat16."""
    with Engine(model, threads=2, prefill_chunk=chunk) as engine:
        got = engine.logits(PROMPT)
        tolerance = 8e-2 if ISAS[engine.backend.isa].has_tiles else 2e-2
    reference = expected[3]
    assert np.abs(got - reference).max() <= tolerance * np.ptp(reference)


def test_exact_weights_agree_with_plain_numpy(model):
    with Engine(model, quantize="none", backend=NaiveBackend()) as engine:
        reference = engine.logits(PROMPT)
    with Engine(model, quantize="none", kv_dtype="f32", threads=2) as engine:
        got = engine.logits(PROMPT)
    assert np.abs(got - reference).max() <= 1e-5 * np.ptp(reference)


def test_governors_are_for_what_can_be_chosen(model, expected):
    """And whatever they choose, the tokens stay the same."""
    tokens, _, experts, _ = expected
    used = set()

    class Watched(Governors):
        def begin(self):
            used.add(tuple(governor.limit() for governor in self))
            super().begin()

    for choices, names in [
        (dict(quantize="none"), []),  # all of it in memory
        (dict(expert_ram=experts // 2), ["look-ahead", "read depth"]),
        (dict(expert_ram=experts // 2, look_ahead=0), ["read depth"]),
        (dict(expert_ram=experts // 2, readers=1), ["look-ahead"]),
    ]:
        with Engine(model, threads=2, **choices) as engine:
            assert [governor.name for governor in engine.governors] == names
    with Engine(model, threads=2, expert_ram=experts // 2) as engine:
        for governor in engine.governors:
            governor.window = governor.max_patience = 1  # they probe all the time
        engine.generation.governors = Watched(list(engine.governors))
        assert list(engine.generate_tokens(PROMPT, len(tokens))) == tokens
    assert len(used) > 2


@pytest.mark.parametrize("look_ahead", [0, 1])
def test_a_replayed_trace_has_the_live_counts(model, expected, tmp_path, look_ahead):
    _, _, experts, _ = expected
    file = tmp_path / "routing.trace"
    with Engine(model, expert_ram=experts // 3, look_ahead=look_ahead, threads=2) as engine:
        with engine.record(file):
            list(engine.generate_tokens(PROMPT, NUM_TOKENS))
        live, policy, capacity = engine.stats, engine.choices.policy, engine.plan.slots
    result = replay(read_trace(file), policy, capacity)
    assert (result.hits, result.misses) == (live.hits, live.misses)
    assert result.prefetches == live.prefetches
    assert result.prefetches_used == live.prefetches_used


def test_bytes_read_are_misses_times_blob_size(model, expected):
    with Engine(model, expert_ram=expected[2] // 3, look_ahead=0, threads=2) as engine:
        list(engine.generate_tokens(PROMPT, NUM_TOKENS))
        stats, blob = engine.stats, engine.store.blob_bytes[0]
    assert stats.bytes_read == stats.misses * blob


def test_a_chat_computes_only_what_is_new(model):
    with Engine(model, threads=2) as engine:
        sequence = engine.open_sequence()
        first = list(engine.generate_tokens(PROMPT, 4, sequence=sequence))
        before = engine.stats
        list(engine.generate_tokens([*PROMPT, *first[:-1], 7, 8], 2, sequence=sequence))
        assert (engine.stats - before).prompt_tokens == 2


def test_a_disk_error_in_the_middle_leaves_everything_usable(model, expected, monkeypatch):
    tokens, floor, _, _ = expected
    with Engine(model, expert_ram=floor, look_ahead=0, threads=2) as engine:
        read, calls = engine.store.read_into, []

        def failing(key, slot):
            calls.append(key)
            if len(calls) == 40:
                raise OSError(5, "Input/output error", "model.safetensors")
            read(key, slot)

        engine.source.tier.source = type("Source", (), {"read_into": staticmethod(failing)})
        with pytest.raises(OSError, match=r"expert \d+ of layer \d+.*model.safetensors"):
            list(engine.generate_tokens(PROMPT, NUM_TOKENS))
        assert list(engine.generate_tokens(PROMPT, NUM_TOKENS)) == tokens
        assert engine.kv.free_tokens >= engine.context


def test_nothing_is_left_after_close(model, expected):
    def descriptors():
        return len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0

    generate(model, 2)  # what is opened once per process is open now
    threads, files = threading.active_count(), descriptors()
    for _ in range(3):
        generate(model, 2, expert_ram=expected[1])
    assert (threading.active_count(), descriptors()) == (threads, files)


def test_the_context_is_a_limit_with_a_clear_message(model):
    with Engine(model, context=64, threads=1) as engine:
        with pytest.raises(ValueError, match=r"65 tokens and the context holds 64.*--context"):
            list(engine.generate_tokens([5] * 65))
        assert len(list(engine.generate_tokens([5] * 60, 100))) == 5
        with pytest.raises(ValueError, match="empty"):
            list(engine.generate_tokens([]))
        with pytest.raises(ValueError, match="token ids must lie in"):
            list(engine.generate_tokens([10**6]))


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        (dict(expert_ram=1000), "too small.*--expert-ram at least"),
        (dict(ram="10M"), "too little.*--ram at least"),
        (dict(policy="fifo"), "unknown policy 'fifo'"),
        (dict(policy="fifo", quantize="none"), "unknown policy 'fifo'"),  # all experts fit
        (dict(expert_ram="much"), "no size"),
        (dict(quantize="int3"), "int4, int4_g128, nf4, none"),
        (dict(look_ahead=9), "look_ahead"),
        (dict(threads=0), "threads"),
        (dict(isa="mmx"), "mmx"),
        (dict(vram="16G"), "vram is a GPU's.*--device"),
    ],
    ids=str,
)
def test_choices_that_cannot_work_are_refused(model, choices, message):
    with pytest.raises((ValueError, MemoryError), match=message):
        Engine(model, **choices)


def test_unknown_choices_are_errors(model):
    with pytest.raises(TypeError, match="expert_rom"):
        Engine(model, expert_rom="2G")


def test_scoring_an_answer_agrees_with_logits(model):
    with Engine(model, quantize="none", kv_dtype="f32", threads=2) as engine:
        got = engine.score_tokens(PROMPT[:16], PROMPT[16:])
        logits = engine.logits(PROMPT).astype(np.float64)
    expected = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    assert np.allclose(got, [expected[15 + i, token] for i, token in enumerate(PROMPT[16:])])


def test_text_and_stop_strings(model):
    with Engine(model, threads=2) as engine:
        whole = "".join(engine.generate("the of", 40))
        assert whole
        stop = whole[5:8]
        assert "".join(engine.generate("the of", 40, stop=[stop])) == whole[: whole.index(stop)]
        sampled = ["".join(engine.generate("the", 8, temperature=1.0, seed=s)) for s in (1, 1, 2)]
        assert sampled[0] == sampled[1] != sampled[2]


@pytest.mark.parametrize("model_type", tiny.ARCHITECTURES)
def test_a_gguf_file_is_the_same_model_as_its_folder(model_type, tmp_path):
    folder = tiny.hf_checkpoint(tmp_path / "hf", model_type, dtype="f32")
    file = tiny.gguf_checkpoint(tmp_path / "model.gguf", model_type, format="f32")
    logits = []
    for path in (folder, file):
        with Engine(path, quantize="none", kv_dtype="f32", threads=2) as engine:
            logits.append(engine.logits(PROMPT))
    assert np.abs(logits[0] - logits[1]).max() <= 1e-5 * np.ptp(logits[0])


@pytest.mark.parametrize("format", [n for n in FORMATS if n != "f32" and FORMATS[n].is_ggmls])
def test_every_gguf_type_mapped_tiered_and_against_plain_numpy(format, tmp_path):
    mixed = {"down": "q6_k"} if format == "q4_k" else None
    sizes = dict(hidden_size=256, expert_size=256)
    file = tiny.gguf_checkpoint(
        tmp_path / "model.gguf", "mixtral", format=format, formats=mixed, **sizes
    )
    with Engine(file, threads=2) as engine:
        mapped, budget = engine.logits(PROMPT), engine.plan.experts // 2
    with Engine(file, threads=2, expert_ram=budget) as engine:
        assert not engine.plan.mapped
        assert np.array_equal(engine.logits(PROMPT), mapped)
    with Engine(file, quantize="none", backend=NaiveBackend()) as engine:
        reference = engine.logits(PROMPT)
    with Engine(file, quantize="none", kv_dtype="f32", threads=2) as engine:
        exact = engine.logits(PROMPT)
    assert np.abs(exact - reference).max() <= 1e-5 * np.ptp(reference)
    # int8 activations are close, but for a few tokens the router of nearly tied experts turns over
    assert np.quantile(np.abs(mapped - reference), 0.8) <= 0.05 * np.ptp(reference)


def test_a_store_is_the_same_model_as_its_source(tmp_path):
    folder = tiny.hf_checkpoint(tmp_path / "hf", "qwen2_moe", tokenizer=True)
    store = convert(folder, tmp_path / "store")
    assert np.array_equal(*[_logits(path) for path in (folder, store)])


def _logits(path):
    with Engine(path, threads=2) as engine:
        return engine.logits(PROMPT)


@pytest.mark.parametrize("name", ["layers.1.q", "layers.0.router", "layers.1.v", "EXPERT"])
def test_weights_that_are_not_numbers_are_named(tmp_path, name):
    file = tiny.gguf_checkpoint(tmp_path / "model.gguf", "mixtral", format="q4_0")
    with Engine(file, threads=1) as engine:
        used = []
        engine.source.journal = type(
            "Journal", (), {"fetched": lambda _, keys, __: used.append(keys)}
        )()
        list(engine.generate_tokens(PROMPT, 2))
        if name == "EXPERT":
            name = f"layers.0.experts.{used[0][0].expert}.gate"
        tensor = engine.checkpoint.tensors[name]
    data = bytearray(file.read_bytes())
    nan = b"\x00\x00\xc0\x7f" if tensor.format == "f32" else b"\x00\x7e"
    data[tensor.offset : tensor.offset + len(nan)] = nan
    file.write_bytes(data)
    with pytest.raises(ValueError, match=rf"model.gguf: tensor {name} is damaged"):  # noqa: SIM117
        with Engine(file, threads=1) as engine:
            list(engine.generate_tokens(PROMPT, 2))
