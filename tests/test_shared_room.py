"""Expert slots and the KV cache share a card's memory: what a context takes, slots give up."""

import threading
from importlib.util import find_spec
from inspect import signature
from itertools import pairwise

import numpy as np
import pytest
import tiny
from faults import NullMemory

from gpu_backend.kv_shapes import kv_shapes, token_bytes
from gpu_backend.slots import GpuSlots
from tiered import Engine, policies
from tiered.demo import random_tiny_model
from tiered.experts import ExpertKey
from tiered.formats import open_checkpoint
from tiered.gpu import accelerator
from tiered.kv_cache import PAGE_SIZE, KVCache, device_bytes, kv_bytes
from tiered.policies import Space
from tiered.serve import prefix
from tiered.serve.prefix import PrefixCache
from tiered.tier import Tier

PROMPT = np.random.default_rng(0).integers(3, 256, 50).tolist()
NUM_TOKENS = 24  # until a second page is needed, and on
needs_torch = pytest.mark.skipif(find_spec("torch") is None, reason="torch is not installed")
DEVICES = [
    ("sim:rtx4060ti-16gb", "f16"),
    ("sim:rtx4060ti-16gb,sim:t4", "int8"),
    pytest.param("sim", "int8", marks=needs_torch),
    pytest.param("sim:2", "f16", marks=needs_torch),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return random_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize(("device", "kv_dtype"), DEVICES)
def test_slots_shrink_while_a_context_grows_and_tokens_stay(model, device, kv_dtype):
    choices = {"device": device, "threads": 2, "context": 128, "kv_dtype": kv_dtype}
    with Engine(model, **choices) as engine:
        expected = list(engine.generate_tokens(PROMPT, NUM_TOKENS))
        logits = engine.logits(PROMPT)
        vram = ",".join(str(share.needed + 64) for share in engine.shares)
    with Engine(model, **choices, vram=vram) as engine:
        memories = engine.kv._room.memories
        tiers = [memory.tier for memory in memories]
        at_first = [tier.residency.num_slots for tier in tiers]
        texts = [engine.generate_tokens(PROMPT, NUM_TOKENS) for _ in range(2)]
        got, counts = [], []
        for token in texts[0]:
            got.append(token)
            counts.append([tier.residency.num_slots for tier in tiers])
            for memory, tier in zip(memories, tiers, strict=True):
                pages = engine.kv._extent * memory.page_bytes
                slots = tier.residency.num_slots * tier.memory.stride
                assert slots + pages <= memory.nbytes == len(tier.memory.slab)
                table = np.asarray(tier.memory.table)
                assert table.max() < tier.residency.num_slots
        assert got == expected
        assert all(a >= b for one, other in pairwise(counts)
                   for a, b in zip(one, other, strict=True))  # fmt: skip
        assert all(a > b for a, b in zip(at_first, counts[-1], strict=True))
        assert counts[-1][0] >= engine.config.top_k + 1
        assert [tier.residency.num_slots for tier in tiers] == at_first  # the text has ended
        assert list(texts[1]) == expected and np.array_equal(engine.logits(PROMPT), logits)


def test_a_text_that_needs_all_of_the_cache_leaves_the_least(model):
    with Engine(model, device="sim:t4", threads=2, context=128) as engine:
        vram = engine.shares[0].needed + 64
    with Engine(model, device="sim:t4", threads=2, context=128, vram=vram) as engine:
        assert len(list(engine.generate_tokens(PROMPT, 70))) == 70
        text = engine.open_sequence()
        assert engine.kv.grow(text, 128)
        (memory,) = engine.kv._room.memories
        assert memory.tier.residency.num_slots == engine.config.top_k + 1
    with pytest.raises(MemoryError, match="--vram at least"):
        Engine(model, device="sim:t4", threads=2, context=1 << 12, vram=vram)


def test_slots_come_back_as_remembered_beginnings_are_forgotten(model):
    choices = dict(device="sim:t4", threads=2, context=320)
    with Engine(model, **choices) as engine:
        vram = engine.shares[0].needed + 64
    with Engine(model, **choices, vram=vram) as engine:
        (memory,), prefixes = engine.kv._room.memories, PrefixCache(engine.kv)
        counts = [memory.tier.residency.num_slots]
        text = engine.open_sequence()
        engine.generation.begin(text, (PROMPT * 6)[: 4 * PAGE_SIZE + 1])
        prefixes.insert(text)
        engine.kv.close(text)
        while True:
            counts.append(memory.tier.residency.num_slots)
            if not prefixes.evict(1):
                break
        assert len(counts) == 6 and counts[1] < counts[-1] == counts[0]
        assert counts[1:] == sorted(counts[1:])


def test_what_nobody_begins_with_for_long_gives_way_to_slots(model, monkeypatch):
    monkeypatch.setattr(prefix, "PATIENCE", 10)
    choices = {"device": "sim:t4", "threads": 2, "context": 384}
    with Engine(model, **choices) as engine:
        vram = engine.shares[0].needed + 64
    with Engine(model, **choices, vram=vram) as engine:
        (memory,), prefixes = engine.kv._room.memories, PrefixCache(engine.kv)
        at_first, texts = memory.tier.residency.num_slots, [PROMPT * 3, PROMPT[::-1] * 3]
        for tokens in texts:  # two pages each, those of the second after those of the first
            text = engine.open_sequence()
            engine.generation.begin(text, tokens)
            prefixes.insert(text)
            engine.kv.close(text)
        assert engine.kv.last_page == 3 and len(prefixes) == 4
        for _ in range(9):
            prefixes.make_way()
        assert len(prefixes) == 4 and prefixes.match(texts[0]) == [0, 1]
        running = engine.kv.open(texts[1][:PAGE_SIZE], prefixes.match(texts[1])[:1])
        for _ in range(10):
            prefixes.make_way()
        assert len(prefixes) == 3  # the text that runs holds page 2
        engine.kv.close(running)
        prefixes.match(texts[0])
        prefixes.make_way()
        assert len(prefixes) == 2 and prefixes.matched_tokens(texts[1]) == 0
        less = memory.tier.residency.num_slots
        for _ in range(8):
            prefixes.make_way()
        assert memory.tier.residency.num_slots == less < at_first
        prefixes.make_way()
        assert len(prefixes) == 0 and memory.tier.residency.num_slots == at_first
        assert engine.kv.last_page is None


def test_where_nobody_wants_the_room_all_is_remembered(model, monkeypatch):
    monkeypatch.setattr(prefix, "PATIENCE", 1)
    for choices in ({}, {"device": "sim:t4"}):  # all experts have slots there
        with Engine(model, threads=2, **choices) as engine:
            prefixes, text = PrefixCache(engine.kv), engine.open_sequence()
            engine.generation.begin(text, PROMPT * 3)
            prefixes.insert(text)
            engine.kv.close(text)
            for _ in range(5):
                prefixes.make_way()
            assert len(prefixes) == 2 and engine.kv.last_page is None


class Pages:
    """A backend that has pages and nothing else."""

    def kv_pages(self, *arguments):
        return None


class Room:
    is_wanted = False

    def __init__(self):
        self.held = []

    def hold(self, num_pages):
        self.held.append(num_pages)


def test_the_cache_holds_up_to_its_last_page_in_use(model):
    room = Room()
    with open_checkpoint(model) as checkpoint:
        kv = KVCache(Pages(), checkpoint.config, 8 * PAGE_SIZE, room=room)
    first, second = kv.open(), kv.open()
    assert kv.grow(first, 2 * PAGE_SIZE) and kv.grow(second, 1) and kv.grow(first, 2 * PAGE_SIZE)
    assert room.held == [2, 3] and second.pages[0] == 2
    first.tokens.extend(range(2 * PAGE_SIZE))
    kv.truncate(first, PAGE_SIZE)  # page 1 is free; page 2 is not
    assert room.held == [2, 3]
    third = kv.open()
    assert kv.grow(third, 1) and third.pages[0] == 1  # the lowest that is free
    second.tokens.append(0)
    kv.close(second)
    assert room.held == [2, 3, 2]
    assert not kv.grow(third, 9 * PAGE_SIZE) and room.held == [2, 3, 2]
    kv.close(first)
    assert kv.open([0] * PAGE_SIZE, [1]).num_pages == 1
    third.tokens.append(0)
    kv.close(third)
    assert room.held == [2, 3, 2]  # page 1 has another holder


class Gated:
    """A source whose reads end when they may."""

    def __init__(self):
        self.gate = threading.Event()
        self.begun = threading.Event()
        self.ended = 0

    def read_into(self, key, buffer):
        self.begun.set()
        assert self.gate.wait(30)
        self.ended += 1


class Slots(NullMemory):
    def __init__(self, space):
        super().__init__(space)
        self.given_back = []

    def give_back(self, slot):
        self.given_back.append(slot)


def test_a_slot_is_given_up_only_when_nobody_writes_to_it():
    source, space = Gated(), Space(4, (1,) * 2)
    memory = Slots(space)
    with Tier(memory, source, policies.create("lru", space)) as tier:
        source.gate.set()
        list(tier.fetch([ExpertKey(0, expert) for expert in range(3)]))
        source.gate.clear()
        source.begun.clear()
        tier.prefetch([ExpertKey(1, 0)])  # into the last slot
        assert source.begun.wait(30)
        done = []
        thread = threading.Thread(target=lambda: done.append(tier.use_slots(2)))
        thread.start()
        thread.join(0.1)
        assert not done
        source.gate.set()
        thread.join(30)
        assert done and source.ended == 4 and memory.given_back == [2, 3]
        assert sorted(key.expert for key in tier.residency.keys) == [0, 1]
        assert tier.residency.space.capacity == 2
        list(tier.fetch([ExpertKey(1, 1), ExpertKey(1, 2)]))
        assert {tier.residency.slot(key) for key in tier.residency.keys} == {0, 1}
        tier.use_slots(4)
        list(tier.fetch([ExpertKey(0, expert) for expert in range(2)]))
        assert {tier.residency.slot(key) for key in tier.residency.keys} == {0, 1, 2, 3}


@pytest.mark.parametrize("model_type", ["mixtral", "deepseek_v2", "granitemoehybrid", "gemma4"])
@pytest.mark.parametrize("dtype", ["f32", "f16", "int8"])
def test_budgets_count_what_a_card_keeps(model_type, dtype, tmp_path):
    with open_checkpoint(tiny.hf_checkpoint(tmp_path / model_type, model_type)) as checkpoint:
        config = checkpoint.config
        layers = range(config.num_layers)
        counted = sum(device_bytes(config, layer, 100, dtype) for layer in layers)
        kept = token_bytes(kv_shapes(config).values(), dtype)
        assert counted == 2 * PAGE_SIZE * kept
        if config.latent.kv_rank:  # keys and values are one vector there, and two on the CPU
            assert counted < 0.7 * kv_bytes(config, 100, dtype)


def test_budgets_know_what_a_device_needs_beside():
    pytest.importorskip("torch")
    from gpu_backend import flash

    assert accelerator.SCORES == flash.SCORES
    staging = signature(GpuSlots).parameters["num_staging"]
    assert staging.default == accelerator.NUM_STAGING
