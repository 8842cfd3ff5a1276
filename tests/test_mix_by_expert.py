"""Experts of one layer in several number formats: chosen, written, read, counted and computed."""

import json
import shutil

import numpy as np
import pytest
import tiny
from other_weights import logits_with

from cpu_kernels.formats import FORMATS
from tiered import Engine, policies
from tiered.cache.residency import Residency
from tiered.experts import ExpertKey, expert_layout
from tiered.formats import CheckpointError, open_checkpoint
from tiered.planning.sizes import of_checkpoint
from tiered.policies import Space
from tiered.quantizing.quantize import Recipe, quantize
from tiered.quantizing.rewritten import Rewritten
from tiered.store import ExpertStore
from tiered.tracing.replay import replay
from tiered.tracing.trace import TraceInfo, TraceWriter, read_trace
from tiered.weights.convert import convert

IDS = np.random.default_rng(0).integers(3, 300, 400).tolist()
NUM_TOKENS = 16
NAMES = ("mxfp4", "q4_0", "q5_0", "q8_0")
RECIPE = Recipe(
    method="rtn", bits=5.6, mix_by="expert", formats=NAMES, sensitivity_tokens=128, window=64,
    threads=2,
)  # fmt: skip


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return tiny.hf_checkpoint(tmp_path_factory.mktemp("source") / "hf", "olmoe", tokenizer=True)


@pytest.fixture(scope="module")
def made(source, tmp_path_factory):
    """A mixed store, and what was said when it was made."""
    path = tmp_path_factory.mktemp("mixed") / "store"
    result = quantize(source, path, RECIPE, IDS)
    return path, result


@pytest.fixture(scope="module")
def mixed(made):
    return made[0]


@pytest.fixture(scope="module")
def expected(mixed):
    """Tokens and logits with all experts in memory; the least budget, and the whole, in bytes."""
    with Engine(mixed, threads=1, look_ahead=0) as engine:
        assert engine.store.is_mix and engine.plan.mapped
        floor = engine.config.top_k * max(engine.store.blob_bytes)
        tokens = list(engine.generate_tokens(IDS[:30], NUM_TOKENS))
        return tokens, engine.logits(IDS[:30]), floor, engine.plan.experts


# --- choosing, and writing ---


def test_each_expert_has_what_it_was_given(made, source, tmp_path):
    """As many bits as asked for, more of them for who has more of the error; and the very bytes
    that experts have where all are of that format."""
    path, result = made
    assert RECIPE.bits - 0.3 < result.bits <= RECIPE.bits
    for (layer, part, _), shares in result.shares.items():
        assert sum(shares) == pytest.approx(1)
        at = 2 if part == "down" else 0
        bits = [FORMATS[formats[at]].bits for formats in result.formats[layer]]
        for a, b in zip(np.argsort(shares)[:-1], np.argsort(shares)[1:], strict=True):
            assert bits[a] <= bits[b]
    assert any(len(set(formats)) > 1 for formats in result.formats.values())
    for name in NAMES:
        quantize(source, tmp_path / name, Recipe(method="rtn", format=name, threads=2))
    with open_checkpoint(path) as checkpoint:
        sizes = [t.nbytes for n, t in checkpoint.tensors.items() if ".experts." in n]
        assert 8 * sum(sizes) / (2 * 8 * 3 * 64 * 64) == pytest.approx(result.bits)
        for name in NAMES:
            with open_checkpoint(tmp_path / name) as alike:
                for layer, formats in result.formats.items():
                    for expert, each in enumerate(formats):
                        for part, format in zip(("gate", "up", "down"), each, strict=True):
                            if format == name:
                                tensor = f"layers.{layer}.experts.{expert}.{part}"
                                assert np.array_equal(checkpoint.data(tensor), alike.data(tensor))
        checkpoint.verify()


def test_threads_do_not_matter_and_gptq_mixes_too(source, tmp_path):
    results = []
    for threads in (1, 2):
        recipe = Recipe(
            bits=5.6, mix_by="expert", formats=NAMES, sensitivity_tokens=64, window=64,
            threads=threads,
        )  # fmt: skip
        results.append(quantize(source, tmp_path / f"{threads}", recipe, IDS))
    assert results[0] == results[1]
    with open_checkpoint(tmp_path / "1") as a, open_checkpoint(tmp_path / "2") as b:
        for name in a.tensors:
            assert np.array_equal(a.data(name), b.data(name)), name


def test_scaled_methods_mix_too(source, tmp_path):
    recipe = Recipe(method="awq", bits=5.6, mix_by="expert", formats=NAMES, window=64, threads=2)
    quantize(source, tmp_path / "after", recipe, IDS)
    with Engine(tmp_path / "after", threads=1) as engine:
        assert engine.store.is_mix and np.isfinite(engine.logits(IDS[:8])).all()


@pytest.mark.parametrize("what, number", [("sensitivity", 1), ("rounding", 1), ("writing", 1)])
def test_what_was_interrupted_goes_on(made, source, tmp_path, what, number):
    def stop(doing, done, total):
        if doing == what and done >= number:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(source, tmp_path / "after", RECIPE, IDS, stop)
    assert not (tmp_path / "after").exists()
    assert quantize(source, tmp_path / "after", RECIPE, IDS) == made[1]
    with open_checkpoint(tmp_path / "after") as one, open_checkpoint(made[0]) as other:
        for name in one.tensors:
            assert np.array_equal(one.data(name), other.data(name)), name
    assert [path.name for path in tmp_path.iterdir()] == ["after"]


def test_a_mixed_store_can_be_quantized_again(mixed, tmp_path):
    quantize(mixed, tmp_path / "alike", Recipe(window=64, threads=2), IDS)
    with open_checkpoint(tmp_path / "alike") as checkpoint, ExpertStore(checkpoint) as store:
        assert store.layout(0).up.format == "q4_0"
    with pytest.raises(ValueError, match="one tensor, of one format: write a store instead"):
        quantize(mixed, tmp_path / "after.gguf", RECIPE, IDS)


# --- computing ---


def test_it_is_the_model_that_its_experts_are(mixed, tmp_path):
    """Beside the same values, all of them as float32."""
    (tmp_path / "scratch").mkdir()
    with Engine(mixed, quantize="none", threads=2, kv_dtype="f32") as engine:
        got = engine.logits(IDS[:40])
        alike = Rewritten(engine.checkpoint, tmp_path / "scratch")
        for name in [name for name in alike.tensors if ".experts." in name]:
            alike.rewrite(name, alike.float32(name))
        with ExpertStore(alike, "none") as store:
            assert not store.is_mix
        want = logits_with(engine, alike, IDS[:40])
    assert np.abs(got - want).max() <= 1e-5 * np.ptp(want)


@pytest.mark.parametrize("policy", policies.online())
def test_budgets_and_policies_never_change_the_tokens(mixed, expected, policy):
    tokens, logits, floor, experts = expected
    for expert_ram in (floor, experts // 2):
        with Engine(mixed, threads=2, policy=policy, expert_ram=expert_ram) as engine:
            assert list(engine.generate_tokens(IDS[:30], NUM_TOKENS)) == tokens
            assert np.array_equal(engine.logits(IDS[:30]), logits)
            tier = engine.source.tier
            assert tier.residency.used <= expert_ram and tier.residency.stats.misses > 0


@pytest.mark.parametrize(
    "choices", [dict(threads=1), dict(threads=3), dict(look_ahead=0), dict(readers=1)], ids=str
)
def test_other_choices_never_change_the_tokens(mixed, expected, choices):
    with Engine(mixed, expert_ram=expected[3] // 2, **choices) as engine:
        assert list(engine.generate_tokens(IDS[:30], NUM_TOKENS)) == expected[0]


def test_a_mix_is_a_cold_copy_and_has_one(mixed, source, tmp_path):
    smallest = tmp_path / "mxfp4"
    quantize(source, smallest, Recipe(method="rtn", format="mxfp4", threads=2))
    for model, copy, precision in [(source, mixed, "none"), (mixed, smallest, "int4")]:
        choices = dict(quantize=precision, threads=2, look_ahead=0, cold_copy=copy, cold_below=1.0)
        with open_checkpoint(model) as checkpoint, ExpertStore(checkpoint, precision) as store:
            budget = checkpoint.config.top_k * max(store.blob_bytes)
        with Engine(model, expert_ram=budget, **choices) as engine:
            assert len(list(engine.generate_tokens(IDS[:8], NUM_TOKENS))) == NUM_TOKENS
            served, read = engine.stats.copied_experts, engine.cold_copy.bytes_read
            assert 0 < read <= served * max(engine.copy.blob_bytes)


# --- counting ---


@pytest.mark.parametrize("policy", policies.online())
def test_replay_is_live(mixed, expected, policy, tmp_path):
    file, budget = tmp_path / "trace", int(expected[3] * 0.4)
    with Engine(mixed, expert_ram=budget, policy=policy, threads=2) as engine:
        with engine.record(file):
            list(engine.generate_tokens(IDS[:30], NUM_TOKENS))
        live = engine.source.tier.stats
    trace = read_trace(file)
    assert trace.info.mixes
    for compile in (False, True):
        got = replay(trace, policy, budget, compile=compile)
        assert (got.hits, got.misses, got.evictions) == (live.hits, live.misses, live.evictions)
        assert (got.read_bytes, got.prefetch_bytes) == (live.bytes_read, live.bytes_prefetched)
    best, twin = (replay(trace, "belady", budget, compile=compile) for compile in (False, True))
    assert best.misses == twin.misses > 0


def test_a_budget_counts_each_experts_bytes():
    space = Space(10, (4, 3), {0: (4, 1, 1, 2)})
    assert [space.nbytes(ExpertKey(*key)) for key in [(0, 0), (0, 3), (1, 3)]] == [4, 2, 3]
    assert space.num_slots == 10 and space.average_bytes == [2, 3]
    cache = Residency(space, policies.create("lru", space))
    cache.demand([ExpertKey(0, 0), ExpertKey(0, 1), ExpertKey(0, 2), ExpertKey(0, 3)])
    assert (cache.used, cache.stats.bytes_read, len(cache)) == (8, 8, 4)
    cache.demand([ExpertKey(1, 0)])  # takes the place of the large one alone
    assert ExpertKey(0, 0) not in cache and (cache.used, len(cache)) == (7, 4)


@pytest.mark.parametrize(
    "mixes", [{"3": [5, 4]}, {"0": [5]}, {"0": [5, 0]}, {"0": [5, 6]}, {"0": 5}, [5], {"x": [5, 5]}]
)
def test_a_trace_of_another_model_is_refused(mixes, tmp_path):
    with TraceWriter(tmp_path / "trace", TraceInfo("m", 2, 1, (5, 5), mixes={0: (5, 4)})):
        pass
    assert read_trace(tmp_path / "trace").info.mixes == {0: (5, 4)}
    magic, header, _ = (tmp_path / "trace").read_bytes().split(b"\n")
    changed = json.dumps(json.loads(header) | {"mixes": mixes}).encode()
    (tmp_path / "trace").write_bytes(b"\n".join([magic, changed, b""]))
    with pytest.raises(ValueError, match="its second line is no header"):
        read_trace(tmp_path / "trace")


# --- files ---


def test_a_store_of_a_store_is_the_same(mixed, tmp_path):
    convert(mixed, tmp_path / "again")
    with open_checkpoint(mixed) as a, open_checkpoint(tmp_path / "again") as b:
        assert a.metadata["experts"] == b.metadata["experts"]
        for name in a.tensors:
            assert np.array_equal(a.data(name), b.data(name)), name
        with ExpertStore(b) as store:
            for key in (ExpertKey(0, 1), ExpertKey(1, 7)):
                assert store.is_blob(key) and store.addresses(key)[0] % 4096 == 0


def run_of(manifest):
    return next(entry for entry in manifest["experts"].values() if isinstance(entry[0], list))[0]


DAMAGE = {
    "an expert less": lambda m: run_of(m)[4].pop(),
    "an expert that is not": lambda m: run_of(m)[4].__setitem__(0, 8),
    "an expert twice": lambda m: run_of(m)[4].append(run_of(m)[4][0]),
    "no expert": lambda m: run_of(m).pop(),
    "no list": lambda m: run_of(m).__setitem__(4, 3),
    "no number": lambda m: run_of(m)[4].__setitem__(0, "0"),
    "truth": lambda m: run_of(m).__setitem__(1, False),
    "a part": lambda m: run_of(m).__setitem__(1, 0.5),
    "beyond": lambda m: run_of(m).__setitem__(1, 2**40),
    "before": lambda m: run_of(m).__setitem__(1, -1),
    "an array": lambda m: run_of(m).__setitem__(0, 99),
    "a format": lambda m: run_of(m).__setitem__(3, ["q8_0", "q8_0", "q9_0"]),
    "too large for its row": lambda m: run_of(m).__setitem__(3, ["f32"] * 3),
    "no run": lambda m: m["experts"].update({"0": []}),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_manifests(mixed, tmp_path, name):
    store = shutil.copytree(mixed, tmp_path / "store")
    manifest = json.loads((store / "manifest.json").read_text())
    DAMAGE[name](manifest)
    (store / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=r"the entry of layer \d is damaged") as raised:
        open_checkpoint(store)
    assert str(store) in str(raised.value) and "\n" not in str(raised.value)


# --- commands ---


def test_sizes_are_told(mixed, expected, tiered):
    _, _, floor, experts = expected
    status, out, _ = tiered("info", mixed, "--json")
    facts = json.loads(out)
    assert status == 0 and facts["experts_bytes"] == experts
    assert facts["least_expert_ram_bytes"] == floor
    assert facts["one_token_cycle_bytes"] == experts * 2 // 8
    with open_checkpoint(mixed) as checkpoint, ExpertStore(checkpoint) as store:
        sizes = of_checkpoint(checkpoint)
        assert 0 <= experts - sizes.all_experts < 2 * 8 and sizes.floor == floor
        assert sum(store.layer_bytes) == experts
    with pytest.raises(MemoryError, match="--expert-ram at least"):
        Engine(mixed, expert_ram=floor - 1)
        assert sizes.in_slots(floor) == pytest.approx(2 * sizes.all_experts / 16, rel=0.01)
    status, out, err = tiered("plan", mixed, "--gpu", "rtx4060-laptop", "--context", 64, "--json")
    assert status == 0 and json.loads(out)["verdict"] == "fits on the GPU", err


def test_commands_that_compute(mixed, source, expected, tmp_path, tiered):
    text = tmp_path / "text.txt"
    text.write_text("the rain in Spain stays mainly in the plain, 1234. " * 6, encoding="utf-8")
    same = "compare", mixed, mixed, "--text", text, "--generate", 0, "--window", 64
    status, out, err = tiered(*same, "--b", f"expert-ram={expected[2]}", "--json")
    assert status == 0 and json.loads(out)["kl_mean"] == 0, err
    status, _, err = tiered("ppl", mixed, "--text", text, "--window", 64)
    assert status == 0, err


def test_what_cannot_be_is_refused(source, mixed, tmp_path, tiered):
    text = tmp_path / "text.txt"
    text.write_text("the rain in Spain stays mainly in the plain, 1234. " * 40, encoding="utf-8")
    by_expert = "--text", text, "--mix-by", "expert"
    for name, more, message in [
        ("after", (), "give --bits, too"),
        ("after.gguf", ("--bits", 5), "one tensor, of one format: write a store instead"),
    ]:
        status, _, err = tiered("quantize", source, tmp_path / name, *by_expert, *more)
        assert status != 0 and message in err and "Traceback" not in err, err
        assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]


# --- on a GPU ---

CARD, TWO = "sim:rtx4060ti-16gb", "sim:rtx4060ti-16gb,sim:t4"


def run_on(mixed, device, **choices):
    """Tokens, logits, the shares of cards, and how many experts ran on cards and beside them."""
    with Engine(mixed, device=device, threads=2, prefill_chunk=7, **choices) as engine:
        tokens = list(engine.generate_tokens(IDS[:30], NUM_TOKENS))
        source = engine.decoder.source
        counts = source.hits + source.copies, source.computed_in_ram
        return tokens, engine.logits(IDS[:30]), engine.shares, counts


@pytest.mark.parametrize("device", [CARD, TWO])
def test_cards_say_what_the_cpu_says(mixed, device):
    with Engine(mixed, threads=2, prefill_chunk=7) as engine:
        tokens = list(engine.generate_tokens(IDS[:30], NUM_TOKENS))
        logits, largest = engine.logits(IDS[:30]), max(engine.store.blob_bytes)
    for budget in ({}, {"expert_ram": 5 * largest}):
        *_, shares, _ = run_on(mixed, device, **budget)
        for num_slots in (None, 3):
            if num_slots is not None:
                sizes = (share.fixed + share.kv + num_slots * largest for share in shares)
                budget["vram"] = ",".join(map(str, sizes))
            got, got_logits, _, counts = run_on(mixed, device, **budget)
            assert got == tokens and np.array_equal(got_logits, logits)
            assert all(counts) or num_slots is None


def test_budgets_never_change_a_bit_in_torch(mixed):
    pytest.importorskip("torch")
    largest = expert_layout(64, 64, "q8_0", "q8_0", "q8_0").nbytes
    tokens, logits, (share,), _ = run_on(mixed, "sim")
    for num_slots, ram in ((3, 5), (8, 3)):
        vram = share.fixed + share.kv + num_slots * largest
        got, got_logits, _, counts = run_on(mixed, "sim", vram=vram, expert_ram=ram * largest)
        assert got == tokens and np.array_equal(got_logits, logits) and all(counts)
