"""Page-locked slots: copied from where they are, held meanwhile, and unlocked before they go."""

import logging
import threading

import numpy as np
import pytest
from fake_gpu import FakePinner
from faults import Blobs

from tiered import Engine, page_locked, policies
from tiered.backend import open_backend
from tiered.config import EngineConfig
from tiered.demo import random_tiny_model
from tiered.experts import ExpertKey, aligned
from tiered.gpu import accelerator
from tiered.page_locked import PageLocked
from tiered.policies import Space
from tiered.slots import RamMemory
from tiered.tier import Tier

CARD, TWO = "sim:rtx4060ti-16gb", "sim:rtx4060ti-16gb,sim:rtx3060-12gb"
PROMPT = np.random.default_rng(0).integers(3, 256, 21).tolist()
NUM_TOKENS = 12
SIZE = 4096  # bytes of a slot


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr(page_locked, "PIECE", 2 * SIZE + 100)


def test_pieces_are_whole_slots():
    pinner, locked = FakePinner(1 << 30), PageLocked()
    assert SIZE not in locked
    locked.lock(pinner, SIZE, 5, SIZE)
    assert pinner.pinned == {SIZE: 2 * SIZE, 3 * SIZE: 2 * SIZE, 5 * SIZE: SIZE}
    assert [place * SIZE in locked for place in (0, 1, 5, 6)] == [False, True, True, False]
    locked.close()
    assert not pinner.pinned and locked.nbytes == 0 and SIZE not in locked
    locked.close()


@pytest.mark.parametrize(("allowed", "kept"), [(0, 0), (2, 0), (4, 2), (10, 8)])
def test_of_what_worked_others_get_a_part(allowed, kept, caplog):
    pinner, locked = FakePinner(allowed * SIZE), PageLocked()
    with caplog.at_level(logging.WARNING, "tiered"):
        locked.lock(pinner, SIZE, 16, SIZE)
    assert locked.nbytes == sum(pinner.pinned.values()) == kept * SIZE
    assert len(caplog.records) == 1
    assert "of 64.0 KiB could be page-locked: copies of the rest" in caplog.text
    locked.close()
    assert not pinner.pinned


def test_memory_is_unlocked_before_any_of_it_is_given_back():
    pinner, memory = FakePinner(1 << 30), RamMemory(Space(6 * SIZE, (SIZE,)))
    memory.lock(pinner, 4 * SIZE + 1)
    assert sum(pinner.pinned.values()) == 4 * SIZE and min(pinner.pinned) == memory.place(0)
    assert [memory.is_locked(slot) for slot in range(6)] == [True] * 4 + [False] * 2
    memory.give_back(5)
    assert memory.locked.nbytes == 4 * SIZE
    memory.give_back(0)
    assert not pinner.pinned and not memory.is_locked(1)
    memory.lock(pinner, 4 * SIZE)
    memory.close()
    assert not pinner.pinned


def test_where_sizes_differ_nothing_is_locked():
    pinner, memory = FakePinner(1 << 30), RamMemory(Space(6 * SIZE, (SIZE, 2 * SIZE)))
    memory.lock(pinner, 1 << 30)
    assert not pinner.pinned and not memory.is_locked(0)
    memory.close()


def tier_of(num_slots):
    space = Space(num_slots * SIZE, (SIZE, SIZE))
    return Tier(RamMemory(space), Blobs(), policies.create("lru", space), loaders=2)


def test_what_a_card_copies_stays_until_it_has_it():
    first, others = ExpertKey(0, 3), [ExpertKey(1, expert) for expert in range(4)]
    with tier_of(2) as tier:
        tier.memory.lock(FakePinner(1 << 30), 1 << 30)
        with tier.lent(first, None) as blob:
            assert blob.ctypes.data == tier.memory.place(tier.residency.slot(first))
            for key in others:  # all in the other slot
                list(tier.fetch([key]))
            assert (blob == 3).all() and first in tier
        list(tier.fetch(others[:2]))
        assert first not in tier


def test_what_is_not_locked_is_copied_and_let_go():
    first, buffer = ExpertKey(0, 3), np.zeros(2 * SIZE, np.uint8)
    with tier_of(1) as tier, tier.lent(first, buffer) as blob:
        assert blob is buffer and (blob[:SIZE] == 3).all() and not blob[SIZE:].any()
        list(tier.fetch([ExpertKey(1, 0)]))
        assert first not in tier


def test_a_budget_that_shrinks_waits_for_copies_and_unlocks():
    pinner = FakePinner(1 << 30)
    with tier_of(4) as tier:
        tier.memory.lock(pinner, 1 << 30)
        list(tier.fetch([ExpertKey(0, expert) for expert in range(4)]))
        thread = threading.Thread(target=tier.resize, args=[2 * SIZE])
        with tier.lent(ExpertKey(0, 1), None) as blob:
            thread.start()
            thread.join(0.1)
            assert thread.is_alive() and len(tier) == 4 and pinner.pinned
            assert (blob == 1).all()
        thread.join(30)
        assert not thread.is_alive() and len(tier) == 2 and not pinner.pinned
        buffer = np.zeros(SIZE, np.uint8)
        with tier.lent(ExpertKey(0, 2), buffer) as blob:
            assert blob is buffer and (blob == 2).all()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return random_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def expected(model):
    with Engine(model, threads=2) as engine:
        blob = max(engine.store.blob_bytes)
        return list(engine.generate_tokens(PROMPT, NUM_TOKENS)), blob


class Never:
    """Numbers from `first` on."""

    def __init__(self, first):
        self._first = first

    def __contains__(self, number):
        return number >= self._first


@pytest.mark.parametrize("device", [CARD, TWO])
@pytest.mark.parametrize(
    ("fails", "num_locked"), [((), 6), (Never(0), 0), (Never(2), 2), ({2}, 2)],
    ids=["all", "none", "some", "once"],
)  # fmt: skip
def test_tokens_are_the_same_whatever_is_locked(
    model, expected, device, fails, num_locked, monkeypatch, caplog
):
    tokens, blob = expected
    monkeypatch.setattr(page_locked, "PIECE", 2 * aligned(blob, SIZE))
    backend = open_backend(EngineConfig(device=device, threads=2))
    devices = [card.device for card in backend.cards]
    for each in devices:
        each.fail_pins = fails
    with Engine(model, backend=backend, device=device, expert_ram=6 * blob) as engine:
        memory = engine.source.tier.memory
        assert memory.locked.nbytes == num_locked * memory.stride
        assert sum(devices[0].locked.values()) == memory.locked.nbytes
        assert devices[-1].locked is devices[0].locked  # once, for all cards
        assert [list(engine.generate_tokens(PROMPT, NUM_TOKENS)) for _ in range(2)] == [tokens] * 2
        assert all(each.num_copies for each in devices)
    assert not devices[0].locked
    warnings = [record for record in caplog.records if "page-locked" in record.message]
    assert len(warnings) == (num_locked < 6)


def test_the_limit_is_what_calibration_found_or_half_of_the_memory(monkeypatch):
    class Card:
        def __init__(self, lockable):
            self.device = type("Device", (), {"lockable_bytes": lockable})

    class Cards:
        def __init__(self, lockable, *names):
            self.cards, self.names = [Card(lockable) for _ in names], names

    known = {"cuda:0": {"pin_limit": 1000}, "cuda:1": {"pin_limit": 500}, "cuda:2": {}}
    monkeypatch.setattr(accelerator, "known_gpus", lambda: known)
    assert accelerator.lockable_bytes(Cards(77, "sim:x")) == 77
    assert accelerator.lockable_bytes(Cards(None, "cuda:0", "cuda:2")) == 800
    assert accelerator.lockable_bytes(Cards(None, "cuda:0", "cuda:1")) == 400
    total = accelerator.psutil.virtual_memory().total
    assert accelerator.lockable_bytes(Cards(None, "cuda:2", "cuda:3")) == total // 2
