import mmap
import random
import threading

import numpy as np
import pytest
from faults import Blobs, NullMemory, Unreliable

from tiered import policies
from tiered.cache.residency import Above, Residency
from tiered.experts import ExpertKey
from tiered.loaders import Loaders
from tiered.policies import Space
from tiered.slots import RamMemory
from tiered.tier import Tier

KEYS = [[ExpertKey(layer, expert) for expert in range(32)] for layer in range(4)]
BLOB = 8192


def make(source, num_slots, policy="lru", loaders=4, blobs=(BLOB,) * 4):
    space = Space(num_slots * max(blobs), blobs)
    return Tier(RamMemory(space), source, policies.create(policy, space), loaders)


def blob(tier, place):
    return tier.memory.slot((place - tier.memory.place(0)) // tier.memory.stride)


def check(tier, key, place):
    values = blob(tier, place)[: tier.memory.space.blob_bytes[key.layer]]
    assert values.min() == values.max() == 32 * key.layer + key.expert


def fetch(tier, keys):
    """Fetch, check every blob, return the positions in the order in which they came."""
    positions = []
    with tier.fetch(keys) as groups:
        for group in groups:
            for position, place in group:
                check(tier, keys[position], place)
                positions.append(position)
    return positions


def test_a_miss_is_read_and_then_a_hit():
    with make(Blobs(), 8) as tier:
        for _ in range(2):
            assert sorted(fetch(tier, KEYS[0][:4])) == [0, 1, 2, 3]
        assert (tier.stats.hits, tier.stats.misses) == (4, 4)
        assert tier.stats.bytes_read == 4 * BLOB
        assert sorted(tier.source.reads) == KEYS[0][:4]


def test_hits_come_first_and_misses_as_they_arrive():
    source = Blobs()
    with make(source, 8) as tier:
        fetch(tier, KEYS[0][:2])
        source.hold()
        with tier.fetch(KEYS[0][:4]) as groups:
            assert [position for position, _ in next(groups)] == [0, 1]
            source.release()
            assert sorted(position for group in groups for position, _ in group) == [2, 3]


def test_nothing_asked_nothing_given():
    with make(Blobs(), 4) as tier:
        assert list(tier.fetch([])) == []
        assert not tier.active


def test_evicting_frees_a_slot_and_writes_nothing():
    with make(Blobs(), 2) as tier:
        for key in KEYS[0][:5]:
            fetch(tier, [key])
        assert tier.stats.evictions == 3
        assert len(tier) == 2
        assert KEYS[0][4] in tier


def test_pinned_is_not_evicted():
    with make(Blobs(), 2) as tier, tier.pinned(KEYS[0][0]) as place:

        def others():
            for key in KEYS[0][1:9]:
                fetch(tier, [key])

        thread = threading.Thread(target=others)
        thread.start()
        thread.join(60)
        assert not thread.is_alive()
        assert KEYS[0][0] in tier
        check(tier, KEYS[0][0], place)


def test_a_batch_never_evicts_its_own():
    with make(Blobs(), 8) as tier:
        fetch(tier, KEYS[0][:8])
        fetch(tier, [*KEYS[0][:4], *KEYS[1][:4]])
        assert all(key in tier for key in [*KEYS[0][:4], *KEYS[1][:4]])


@pytest.mark.parametrize("num_slots", [1, 2, 3, 5, 8, 31])
@pytest.mark.parametrize("policy", ["lru", "layer_lfu", "keep_last"])
def test_more_keys_than_slots_come_in_pieces(num_slots, policy):
    with make(Blobs(), num_slots, policy) as tier:
        for layer in range(4):
            assert sorted(fetch(tier, KEYS[layer])) == list(range(32))
        assert tier.stats.hits + tier.stats.misses == 4 * 32
        assert tier.residency.used <= tier.memory.space.capacity
        assert not tier.active


def test_in_pieces_what_is_resident_is_used_before_it_is_evicted():
    with make(Blobs(), 8) as tier:
        fetch(tier, KEYS[0][24:])
        fetch(tier, KEYS[0])
        assert tier.stats.hits == 8


def test_layers_of_different_sizes_share_the_budget():
    sizes = 8192, 12288, 0, 4000
    with make(Blobs(), 6, "lru", blobs=sizes) as tier:
        rng = random.Random(1)
        for step in range(200):
            layer = (0, 1, 3)[step % 3]
            fetch(tier, rng.sample(KEYS[layer], rng.choice([1, 2, 4, 20])))
            assert tier.residency.used <= tier.memory.space.capacity
            resident = sum(sizes[key.layer] for key in tier.residency._slots)
            assert resident == tier.residency.used
        held = sum(tier.memory._extent)
        assert held <= tier.memory.space.capacity + 96 * len(tier)  # 4000 takes a page


def test_two_threads_wanting_one_expert_load_it_once():
    source = Blobs(held=True)
    with make(source, 4) as tier:
        threads = [threading.Thread(target=fetch, args=(tier, [KEYS[1][9]])) for _ in range(8)]
        for thread in threads:
            thread.start()
        source.release()
        for thread in threads:
            thread.join(60)
        assert source.reads == [KEYS[1][9]]
        assert (tier.stats.hits, tier.stats.misses) == (7, 1)


def test_a_failed_read_names_the_expert_and_leaves_the_tier_usable():
    source = Blobs()
    with make(source, 4) as tier:
        fetch(tier, KEYS[0][:2])
        source.failing = {KEYS[3][7]}
        with pytest.raises(OSError, match=r"expert 7 of layer 3.*on fire"):
            fetch(tier, [KEYS[0][0], KEYS[3][7]])
        assert KEYS[3][7] not in tier
        assert not tier.active
        assert len(tier) == 2
        source.failing.clear()
        assert fetch(tier, [KEYS[3][7]]) == [0]
        assert sorted(fetch(tier, KEYS[0][:3])) == [0, 1, 2]


def test_any_error_of_a_source_reaches_who_waits():
    class Broken:
        def read_into(self, key, buffer):
            raise ValueError("scales are not numbers")

    with make(Broken(), 4) as tier, pytest.raises(OSError, match="not numbers"):
        fetch(tier, KEYS[0][:1])


def test_a_failure_in_a_later_piece():
    source = Blobs()
    source.failing = {KEYS[0][31]}
    with make(source, 8) as tier:
        with pytest.raises(OSError, match="expert 31"):
            fetch(tier, KEYS[0])
        assert not tier.active
        source.failing.clear()
        assert sorted(fetch(tier, KEYS[0])) == list(range(32))


def test_closing_in_the_middle_releases_the_pins():
    source = Blobs()
    with make(source, 8) as tier:
        for keys in (KEYS[0][:8], KEYS[1]):
            groups = tier.fetch(keys)
            next(groups)
            groups.close()
            assert not tier.active
            assert list(groups) == []
        assert len(fetch(tier, KEYS[2][:8])) == 8


def test_an_abandoned_fetch_releases_its_pins():
    with make(Blobs(), 8) as tier:
        groups = tier.fetch(KEYS[0][:8])
        next(groups)
        del groups
        assert not tier.active
        assert len(fetch(tier, KEYS[1][:8])) == 8


def test_an_error_of_the_consumer_releases_the_pins():
    with make(Blobs(), 8) as tier:
        with pytest.raises(ZeroDivisionError), tier.fetch(KEYS[0][:8]) as groups:
            for _ in groups:
                raise ZeroDivisionError
        assert not tier.active


def test_close_ends_the_threads():
    tier = make(Blobs(), 8)
    fetch(tier, KEYS[0][:8])
    tier.close()
    tier.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("tiered-loader")]
    with pytest.raises(RuntimeError, match="closed"):
        tier.fetch(KEYS[0][:1])


def test_close_while_somebody_waits():
    source = Blobs(held=True)
    tier = make(source, 8, loaders=1)
    errors = []

    def wait():
        try:
            fetch(tier, KEYS[0][:4])
        except RuntimeError as error:
            errors.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    source.started.acquire(timeout=60)
    closing = threading.Thread(target=tier.close)
    closing.start()
    thread.join(60)
    source.release()
    closing.join(60)
    assert len(errors) == 1
    assert not closing.is_alive()


class Lent:
    """Reads from a tier below, as the tiers of GPUs do."""

    def __init__(self, below):
        self.below = below

    def read_into(self, key, buffer):
        with self.below.lent(key, buffer) as blob:
            assert blob is buffer  # the memory below is not page-locked


def test_a_tier_is_a_source_for_the_tier_above():
    with make(Blobs(), 8) as ram, make(Lent(ram), 3) as above:
        rng = random.Random(2)
        for _ in range(100):
            fetch(above, rng.sample(KEYS[0], 3))
        assert above.stats.misses == ram.stats.hits + ram.stats.misses


def test_no_budget_for_a_single_expert():
    with pytest.raises(MemoryError, match="cannot hold one expert"):
        Tier(NullMemory(Space(100, (8192,))), Blobs(), policies.create("lru", Space(100, (8192,))))


@pytest.mark.parametrize("seed", range(4))
def test_sixteen_threads_with_failing_and_slow_reads(seed):
    """No deadlock, no lost pin, never another expert's bytes."""
    source = Unreliable(seed)
    wrong, failures = [], [0] * 16
    with make(source, 12, random.Random(seed).choice(policies.online()), loaders=5) as tier:

        def work(index):
            rng = random.Random(100 * seed + index)
            for _ in range(60):
                keys = rng.sample(KEYS[rng.randrange(4)], rng.choice([1, 2, 4, 6, 14]))
                try:
                    if rng.random() < 0.3:
                        tier.prefetch(rng.sample(KEYS[rng.randrange(4)], 3), 2)
                    fetch(tier, keys)
                except OSError:
                    failures[index] += 1
                except BaseException as error:
                    wrong.append(error)
                    raise

        threads = [threading.Thread(target=work, args=(index,)) for index in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
        assert not any(thread.is_alive() for thread in threads)
        assert not wrong
        assert sum(failures) > 0
        assert not tier.active
        assert tier.residency.used <= tier.memory.space.capacity
        source.failures = 0.0
        tier.loaders.close()  # a guess that is being read has drawn its failure already
        tier.loaders = Loaders(tier._read, tier._finished, tier.lock, 5)
        for layer in range(4):
            assert sorted(fetch(tier, KEYS[layer])) == list(range(32))


class Depth:
    def __init__(self, limit):
        self.value = limit

    def limit(self):
        return self.value


@pytest.mark.parametrize("demanded", [True, False])
def test_no_more_reads_at_a_time_than_the_depth_allows(demanded):
    source = Blobs(held=True)
    at_once = 4 if demanded else 2  # half of them may be guesses
    with make(source, 16, loaders=6) as tier:
        tier.loaders.depth = depth = Depth(4)
        if demanded:
            groups = tier.fetch(KEYS[0][:6])
        else:
            tier.prefetch(KEYS[0][:6])
        for _ in range(at_once):
            assert source.started.acquire(timeout=60)
        assert len(source.reads) == at_once
        assert not source.started.acquire(blocking=False)
        depth.value = 1  # those under way end, and then there is one at a time
        source.release()
        if demanded:
            assert sorted(position for group in groups for position, _ in group) == [*range(6)]
        with tier.lock:
            while tier.loads:
                tier.wait()
        source.hold()
        depth.value = 9  # more than there are threads
        with tier.fetch(KEYS[1][:7]) as groups:
            for _ in range(12 - at_once):
                assert source.started.acquire(timeout=60)
            source.release()
            assert sorted(position for group in groups for position, _ in group) == [*range(7)]
    assert len(source.reads) == 13


def test_places_are_page_aligned():
    space = Space(5 * 8192, (5000, 8000))
    memory = RamMemory(space, slack=100)
    assert memory.stride == 8192
    for slot in range(space.num_slots):
        assert memory.place(slot) % 4096 == 0
        assert memory.slot(slot).ctypes.data == memory.place(slot)
    memory.slot(0)[:] = 7
    assert np.all(memory.slot(0) == 7)
    memory.close()


@pytest.mark.parametrize("page", [4096, 16384, 65536])
def test_pages_of_other_systems(page, monkeypatch):
    """16 KiB on Apple's processors, 64 KiB on some servers: advice must begin at one."""
    advised = []

    class Map(mmap.mmap):
        def madvise(self, advice, start=0, length=0):
            assert start % page == 0
            advised.append(start)

    monkeypatch.setattr(mmap, "PAGESIZE", page)
    monkeypatch.setattr(mmap, "mmap", Map)
    space = Space(500_000, (5000, 100_000))
    memory = RamMemory(space)
    for slot in range(space.num_slots):
        memory.fit(slot, 100_000)
    advised.clear()
    for slot in range(space.num_slots):
        memory.fit(slot, 5000)
        memory.give_back(slot)
        assert memory.place(slot) % 4096 == 0
    assert len(advised) == 2 * space.num_slots
    memory.close()


def test_what_a_memory_above_has_leaves_first():
    space = Space(4, (1,))
    residency, above = (Residency(space, policies.create("lru", space)) for _ in range(2))
    keys = [ExpertKey(0, expert) for expert in range(6)]
    residency.lookup(keys[:4])
    above.lookup(keys[1:4])
    residency.above = [Above(above, {keys[1]: 2.0, keys[2]: 3.0, keys[3]: 1.0}.__getitem__)]
    residency.lookup([keys[4]])  # the most popular, since the others leave the memory above sooner
    assert keys[2] not in residency and keys[0] in residency
    residency.lookup([keys[1], keys[5]])  # what is demanded stays
    assert keys[1] in residency and keys[3] not in residency and keys[0] in residency


def test_what_passes_through_a_memory_above_stays_and_so_does_what_later_layers_want():
    space = Space(4, (1, 1, 1))
    residency, above = (Residency(space, policies.create("lru", space)) for _ in range(2))
    later, passed, passing, kept = (ExpertKey(*key) for key in ((2, 0), (0, 0), (1, 0), (1, 1)))
    residency.lookup([later, passed, passing, kept])
    above.lookup([passing, kept])
    residency.above = [Above(above, lambda key: float(key == passing), {passing})]
    for expert, leaves in enumerate((kept, passed), start=2):
        residency.lookup([ExpertKey(1, expert)])
        assert leaves not in residency and later in residency and passing in residency


@pytest.mark.parametrize("policy", policies.online())
def test_a_fetch_of_nothing(policy):
    """As of a GPU's tier, in a layer whose experts all run on the processor."""
    space = Space(3, (1,) * 1)
    with Tier(NullMemory(space), Blobs(), policies.create(policy, space)) as tier:
        with tier.fetch([]) as groups:
            assert list(groups) == []
        assert tier.stats.misses == 0
