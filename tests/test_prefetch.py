import numpy as np
import pytest
from faults import Blobs
from test_tier import KEYS, check, fetch, make

from tiered.cache.residency import TierStats
from tiered.experts import Routing
from tiered.prefetch import Prefetcher, accuracy, ranked


def routing(*rows, weights=None):
    experts = np.array(rows, np.int32)
    if weights is None:
        weights = np.linspace(1, 0.5, experts.shape[1])[None].repeat(len(experts), 0)
    return Routing(experts, np.array(weights, np.float32))


def settled(tier):
    """Wait until nothing is being read."""
    with tier.lock:
        while tier.loads:
            tier.wait()


def test_a_used_guess_is_a_hit_and_read_once():
    with make(Blobs(), 8) as tier:
        assert tier.prefetch(KEYS[1][:3]) == KEYS[1][:3]
        settled(tier)
        fetch(tier, KEYS[1][:2])
        stats = tier.stats
        assert (stats.hits, stats.misses) == (2, 0)
        assert (stats.prefetches, stats.prefetches_used, stats.prefetches_wasted) == (3, 2, 0)
        assert sorted(tier.source.reads) == KEYS[1][:3]
        assert stats.bytes_read == 0
        assert stats.bytes_prefetched == 3 * 8192


def test_demand_waits_for_a_guess_under_way():
    source = Blobs(held=True)
    with make(source, 8) as tier:
        tier.prefetch(KEYS[1][:1])
        source.started.acquire(timeout=60)
        groups = tier.fetch(KEYS[1][:1])
        source.release()
        ((_, place),) = next(groups)
        check(tier, KEYS[1][0], place)
        groups.close()
        assert source.reads == KEYS[1][:1]
        assert tier.stats.late == 1


def test_a_waiting_guess_that_is_demanded_goes_first():
    source = Blobs(held=True)
    with make(source, 8, loaders=1) as tier:
        tier.prefetch(KEYS[1][:4])
        source.started.acquire(timeout=60)
        with tier.fetch([KEYS[1][3]]) as groups:
            source.release()
            next(groups)
        settled(tier)
        assert source.reads[1] == KEYS[1][3]
        assert len(source.reads) == 4


def test_newer_guesses_replace_those_not_started():
    source = Blobs(held=True)
    with make(source, 8, loaders=1) as tier:
        tier.prefetch(KEYS[1][:4])
        source.started.acquire(timeout=60)
        tier.prefetch([KEYS[1][2], KEYS[2][0]])
        assert KEYS[1][0] in tier  # being read
        assert KEYS[1][1] not in tier
        source.release()
        settled(tier)
        assert sorted(source.reads) == sorted([KEYS[1][0], KEYS[1][2], KEYS[2][0]])
        stats = tier.stats
        assert (stats.prefetches, stats.prefetches_wasted) == (5, 2)
        assert stats.bytes_prefetched == 3 * 8192
        assert len(tier) == 3


def test_guesses_evict_neither_the_current_batch_nor_each_other():
    with make(Blobs(), 8) as tier:
        with tier.fetch(KEYS[0][:6]) as groups:
            assert tier.prefetch(KEYS[1][:5]) == KEYS[1][:2]
            list(groups)
        assert tier.prefetch([*KEYS[1][:2], *KEYS[2][:5]]) == []
        assert all(key in tier for key in [*KEYS[0][:6], *KEYS[1][:2]])
        fetch(tier, KEYS[3][:1])
        assert len(tier.prefetch(KEYS[2][:9], limit=4)) == 4


def test_a_guess_evicted_unused_is_wasted():
    with make(Blobs(), 4) as tier:
        tier.prefetch(KEYS[1][:2])
        fetch(tier, KEYS[0][:4])
        assert tier.stats.prefetches_wasted == 2


def test_no_guesses_while_a_batch_comes_in_pieces():
    with make(Blobs(), 8) as tier:
        with tier.fetch(KEYS[0]) as groups:
            next(groups)
            assert tier.prefetch(KEYS[1][:2]) == []
        assert tier.stats.prefetches == 0


def test_a_guess_that_fails_is_read_again_on_demand():
    source = Blobs()
    with make(source, 8) as tier:
        source.failing = {KEYS[1][0]}
        tier.prefetch(KEYS[1][:1])
        with tier.lock:
            while not tier.residency.stats.failures:
                tier.wait()
        with pytest.raises(OSError, match="expert 0 of layer 1"):
            fetch(tier, KEYS[1][:1])
        source.failing.clear()
        fetch(tier, KEYS[1][:1])
        assert source.reads == [KEYS[1][0]] * 3


def test_who_waits_for_a_failing_read_learns_of_it_even_if_another_retries():
    source = Blobs(held=True)
    source.failing = {KEYS[1][0]}
    with make(source, 8) as tier:
        first = tier.fetch(KEYS[1][:1])
        source.started.acquire(timeout=60)
        source.release()
        with tier.lock:
            while not tier.residency.stats.failures:
                tier.wait()
        source.failing.clear()
        second = tier.fetch(KEYS[1][:1])  # starts the read anew
        with pytest.raises(OSError, match="on fire"):
            next(first)
        assert len(next(second)) == 1
        second.close()
        assert not tier.active


def test_an_evicted_guess_still_being_read_does_not_spoil_its_slot():
    source = Blobs(held=True)
    with make(source, 2, loaders=2) as tier:
        tier.prefetch(KEYS[1][:1])
        source.started.acquire(timeout=60)
        groups = tier.fetch(KEYS[0][:2])  # takes both slots
        assert KEYS[1][0] not in tier
        source.release()
        for group in groups:
            for position, place in group:
                check(tier, KEYS[0][position], place)


def test_ranking():
    assert ranked(routing([3, 1, 2], weights=[[0.2, 0.5, 0.3]])) == [1, 2, 3]
    two = routing([3, 1], [1, 2], weights=[[0.5, 0.4], [0.3, 0.6]])
    assert ranked(two) == [1, 2, 3]


def test_accuracy():
    chosen = np.array([[1, 2], [3, 4]])
    assert accuracy(chosen, chosen).slot_overlap == 1.0
    got = accuracy(np.array([[2, 7, 1], [4, 8, 9]]), chosen)
    assert got == (4, 3, 2, 1)
    assert got + got == (8, 6, 4, 2)


class Recorder:
    """In place of a tier."""

    def __init__(self):
        self.calls = []

    def prefetch(self, keys, limit):
        self.calls.append((list(keys), limit))


class Allowed:
    def __init__(self, limit):
        self.value = limit

    def limit(self):
        return self.value


def test_guesses_of_several_layers_go_nearest_first():
    tier = Recorder()
    prefetcher = Prefetcher(tier, num_layers=4, distance=2, allowance=Allowed(2))
    assert prefetcher.distances(0) == range(1, 3)
    prefetcher.submit(1, routing([5, 6]))
    prefetcher.submit(2, routing([7, 8]))
    assert tier.calls[-1] == ([*KEYS[1][5:7], *KEYS[2][7:9]], 4)
    assert prefetcher.distances(2) == range(1, 2)  # there is no fifth layer
    prefetcher.submit(3, routing([9, 1]))
    assert tier.calls[-1] == ([KEYS[3][9], KEYS[3][1]], 2)
    assert prefetcher.distances(3) == range(0)


def test_the_allowance_turns_look_ahead_off():
    prefetcher = Prefetcher(Recorder(), 4, allowance=Allowed(0))
    assert prefetcher.distances(0) == range(0)


def test_guesses_are_scored_by_layer_and_distance():
    prefetcher = Prefetcher(Recorder(), 4, distance=2)
    for layer in range(2):
        prefetcher.observe(layer, routing([1, 2]))
        for distance in prefetcher.distances(layer):
            prefetcher.submit(layer + distance, routing([2, layer]))
    assert prefetcher.accuracy[1, 1] == (2, 1, 1, 0)
    prefetcher.observe(2, routing([1, 2]))
    assert prefetcher.accuracy[2, 1] == (2, 2, 1, 1)
    assert prefetcher.accuracy[2, 2] == (2, 1, 1, 0)
    prefetcher.observe(3, routing([1, 2], [3, 4]))  # another batch than was guessed for
    assert (3, 2) not in prefetcher.accuracy


def test_statistics_can_be_compared():
    with make(Blobs(), 8) as tier:
        fetch(tier, KEYS[0][:3])
        before = tier.stats
        fetch(tier, KEYS[0][:4])
        delta = tier.stats - before
        assert (delta.hits, delta.misses) == (3, 1)
        assert TierStats(hits=3, misses=1).hit_rate == 0.75
        assert before + delta == tier.stats
