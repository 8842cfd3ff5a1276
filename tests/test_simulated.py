"""Described cards (--device sim:CARD): the CPU's tokens, and times that depend on nothing here."""

import json

import numpy as np
import pytest
import tiny

from tiered import Engine
from tiered.demo import random_tiny_model
from tiered.experts import ExpertKey
from tiered.gpu.devices import described, device_names
from tiered.gpu.splits import Fixed
from tiered.loaders import State
from tiered.planning import hardware
from tiered.planning.costs import Line
from tiered.simulated.clock import VirtualClock

CARD, TWO = "sim:rtx4060ti-16gb", "sim:rtx4060ti-16gb,sim:rtx3060-12gb"
PROMPT = np.random.default_rng(0).integers(3, 256, 21).tolist()
NUM_TOKENS = 12
CHUNK = 7  # tokens: of more rows than 16, the CPU alone computes other bits than beside a GPU


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return random_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def expected(model):
    with Engine(model, threads=2, prefill_chunk=CHUNK) as engine:
        blob = max(engine.store.blob_bytes)
        return engine.logits(PROMPT), list(engine.generate_tokens(PROMPT, NUM_TOKENS)), blob


def run(model, device=CARD, **choices):
    """Logits, two texts (the second from other caches), and the stats."""
    with Engine(model, device=device, threads=2, prefill_chunk=CHUNK, **choices) as engine:
        logits = engine.logits(PROMPT)
        texts = [list(engine.generate_tokens(PROMPT, NUM_TOKENS)) for _ in range(2)]
        return logits, texts, engine.stats, engine.shares


def test_cards_are_named_as_plans_name_them():
    assert device_names(TWO) == TWO.split(",")
    assert described(CARD) == hardware.find("rtx4060ti-16gb")
    assert described("sim:0") is described("cuda:1") is described("sim") is None
    with pytest.raises(ValueError, match=r"unknown hardware 'rtx1'; choose one of .*rtx4090"):
        device_names("sim:rtx1")
    with pytest.raises(ValueError, match="has no GPU to be simulated"):
        device_names("sim:desktop")
    with pytest.raises(ValueError, match="device must be auto"):
        device_names("sim:rtx4090,sim")


@pytest.mark.parametrize("device", [CARD, TWO])
@pytest.mark.parametrize("num_slots", [None, 3, 9])
def test_a_simulated_card_says_what_the_cpu_says(model, expected, device, num_slots):
    logits, tokens, blob = expected
    choices = {"expert_ram": 6 * blob}
    if num_slots is not None:
        *_, shares = run(model, device)
        choices["vram"] = ",".join(
            str(share.fixed + share.kv + num_slots * blob) for share in shares
        )
    got, texts, stats, _ = run(model, device, **choices)
    assert np.array_equal(got, logits) and texts == [tokens, tokens]
    assert stats.simulated_decode_seconds > 0 and stats.simulated_prefill_seconds > 0


def test_what_kernels_take_is_learnt_while_they_run(model):
    with Engine(model, device=CARD, threads=2) as engine:
        costs, blob = engine.decoder.source.cards[0].costs, max(engine.store.blob_bytes)
        costs.gpu = Line(1.0, 1e-6, blob)  # nonsense
        list(engine.generate_tokens(PROMPT, 200))
        rates = engine.backend.cards[0].device.machine.rates
        expected = 2 * rates.launch + 2 * blob / rates.gpu
        assert costs.gpu(2 * blob) == pytest.approx(expected, rel=0.2)


@pytest.mark.parametrize("device", [CARD, TWO])
def test_what_a_prompt_used_last_stays_on_cards_and_what_it_used_before_in_ram(tmp_path, device):
    model = random_tiny_model(tmp_path, num_layers=8)
    with Engine(model, threads=2) as engine:
        blob = max(engine.store.blob_bytes)
    with Engine(model, device=device, threads=2, expert_ram=16 * blob) as engine:
        source, random = engine.decoder.source, np.random.default_rng(0)
        for placed, share in zip(source.cards, engine.shares, strict=True):
            placed._prompt_split = Fixed(1)
            placed.vram.use_slots(3 * len(share.layers))
        orders = [random.permutation(8).astype(np.int32) for _ in range(8)]
        for layer, order in enumerate(orders):
            list(source.fetch(layer, order, 20 * np.arange(9, dtype=np.int32)))
        lasts = [share.layers.stop - 1 for share in engine.shares]  # they have all that they used
        for layer in sorted(set(range(8)).difference(lasts)):
            keys = [ExpertKey(layer, expert) for expert in orders[layer].tolist()]
            on_card = [key in source.sources[layer].vram for key in keys]
            assert not any(on_card[:5]) and (any(on_card) or len(source.cards) > 1)
            in_ram = [key in engine.source.tier for key in keys[:5]]
            assert in_ram == sorted(in_ram) and not any(in_ram[:3]) and in_ram[4]


@pytest.mark.parametrize("model_type", ["gpt_oss", "deepseek_v2", "granitemoehybrid"])
def test_other_architectures(model_type, tmp_path):
    model = tiny.hf_checkpoint(tmp_path / model_type, model_type, layers=4)
    with Engine(model, threads=2) as engine:
        tokens = list(engine.generate_tokens(PROMPT, 4))
    with Engine(model, threads=2, device=TWO) as engine:
        assert list(engine.generate_tokens(PROMPT, 4)) == tokens


def test_virtual_time_is_the_same_each_time(model, expected):
    runs = [run(model, expert_ram=6 * expected[2])[2] for _ in range(2)]
    first, second = (
        (stats.simulated_decode_seconds, stats.simulated_prefill_seconds) for stats in runs
    )
    assert first == second


def seconds_on(folder, model, blob, **changes):
    """Virtual seconds of decoding on a card that has something else than the described one."""
    text = (hardware.Path(hardware.__file__).parent / "rtx4060ti-16gb.toml").read_text()
    for name, value in changes.items():
        lines = [line for line in text.splitlines() if not line.startswith(f"{name} =")]
        text = "\n".join(lines).replace("[gpu]", f"[gpu]\n{name} = {value}")
    file = folder / "card.toml"
    file.write_text(text)
    return run(model, f"sim:{file}", expert_ram=6 * blob)[2].simulated_decode_seconds


def test_a_slower_card_takes_longer(model, expected, tmp_path):
    usual = seconds_on(tmp_path, model, expected[2])
    assert seconds_on(tmp_path, model, expected[2], launch=50.0) > 2 * usual
    assert seconds_on(tmp_path, model, expected[2], sync=500.0) > 2 * usual


def test_a_token_takes_what_its_parts_take(model):
    with Engine(model, threads=2, device=CARD) as engine:
        machine = engine.backend.cards[0].device.machine
        sequence = engine.open_sequence()
        engine.generation.begin(sequence, PROMPT[:4])
        for _ in range(30):  # until all experts are on the card
            engine.generation._decode(sequence, [5])
        before, source = engine.timing.clock(), engine.decoder.source
        missed = source.copies + source.computed_in_ram
        engine.generation._decode(sequence, [5])
        seconds = engine.timing.clock() - before
        assert source.copies + source.computed_in_ram == missed
    rates, layers = machine.rates, engine.config.num_layers
    launches = 6 + 1 + 2 + 1  # attention, router, experts, combining
    fixed = layers * (launches * rates.launch + rates.sync) + rates.launch + rates.sync
    weights = engine.plan.dense + layers * engine.config.top_k * max(engine.store.blob_bytes)
    # Of the embeddings one row is read, on the host, and a few keys and values are not counted.
    assert fixed < seconds < fixed + 1.1 * weights / rates.dense


def test_too_little_memory_names_what_works(model):
    with pytest.raises(MemoryError, match=f"{CARD} has 64.0 KiB for layers .*--vram at least"):
        run(model, vram="64K")


def test_the_last_line_is_labelled(tiered, model):
    arguments = "run", model, "hello", "-n", 4, "--raw", "--device", CARD
    status, _, err = tiered(*arguments)
    assert status == 0
    assert "simulated, not measured: GeForce RTX 4060 Ti" in err and "ms a token" in err
    status, out, _ = tiered(*arguments, "--json")
    facts = json.loads(out)
    assert status == 0 and facts["simulated_decode_tok_s"] > 0
    assert facts["simulated_on"].startswith("GeForce RTX 4060 Ti")


def test_bench_and_info_know_cards(tiered, model):
    arguments = "bench", model, "--prefill", 4, "--decode", 4, "--device", TWO
    status, out, err = tiered(*arguments, "--json")
    assert status == 0, err
    report = json.loads(out)
    assert report["simulated"]["decode_tok_s"] > 0 and report["page_locked_bytes"] > 0
    assert [card["layers"] for card in report["cards"].values()] == [[0, 1], [2, 3]]
    status, out, err = tiered(*arguments)
    assert status == 0, err
    assert "sim:rtx4060ti-16gb: layers 0 to 1" in out and "KiB of RAM are page-locked" in out
    status, out, _ = tiered("info", model, "--device", TWO, "--json")
    facts = json.loads(out)
    assert status == 0 and facts["sim:rtx3060-12gb_experts"]["at first"] == "100%"
    assert facts["sim:rtx4060ti-16gb_layers"].startswith("0 to ")
    assert tiered("info", "--device", "cuda")[0] == 2


def test_a_clock_keeps_what_is_beside_apart():
    clock, seen = VirtualClock(), []
    clock.at(1.0, lambda: seen.append(clock.now))
    with clock.aside():
        clock.advance_to(3.0)
        assert clock.now == 3.0 and seen == []
    assert clock.now == 0.0
    clock.advance_to(2.0)
    assert seen == [1.0] and clock.now == 2.0


def test_a_copy_that_fails_is_an_error_and_leaves_everything_usable(model, expected):
    with Engine(model, device=CARD, threads=2) as engine:
        device = engine.backend.cards[0].device
        device.fail_copies.update(range(3))
        with pytest.raises(OSError, match=r"expert \d+ of layer \d+.*aborted"):
            list(engine.generate_tokens(PROMPT, NUM_TOKENS))
        device.fail_copies.clear()
        assert list(engine.generate_tokens(PROMPT, NUM_TOKENS)) == expected[1]
        loads = engine.decoder.source.cards[0].vram.loads.values()
        assert not [load for load in loads if load.state is State.QUEUED]
