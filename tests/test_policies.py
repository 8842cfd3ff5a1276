"""One test over every file in tiered/policies."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tiered import policies
from tiered.cache.residency import Residency
from tiered.experts import ExpertKey
from tiered.policies import Space

NUM_LAYERS = 3
LAYER = st.integers(0, NUM_LAYERS - 1)
BATCHES = st.lists(
    st.tuples(LAYER, st.sets(st.integers(0, 9), min_size=1, max_size=4)), min_size=1, max_size=60
).map(lambda batches: [[ExpertKey(layer, e) for e in sorted(es)] for layer, es in batches])


def residency(name, batches, num_slots=6, blob_bytes=(1,) * NUM_LAYERS):
    space = Space(num_slots * max(blob_bytes), blob_bytes)
    options = {"future": batches} if name == "belady" else {}
    return Residency(space, policies.create(name, space, **options))


class Spy:
    """Passes calls on, and checks the promises that a policy may rely on."""

    def __init__(self, policy):
        self.inner = policy
        self.resident = set()
        for name in ("batch", "surplus"):
            if hasattr(policy, name):
                setattr(self, name, getattr(policy, name))
        if hasattr(policy, "victim_for"):
            self.victim_for = lambda key, evictable: self._checked(
                policy.victim_for(key, evictable), evictable
            )

    def touch(self, key):
        self.resident.add(key)
        self.inner.touch(key)

    def insert(self, key):
        assert key not in self.resident
        self.resident.add(key)
        getattr(self.inner, "insert", self.inner.touch)(key)

    def forget(self, key):
        self.resident.remove(key)
        self.inner.forget(key)

    def victim(self, evictable):
        return self._checked(self.inner.victim(evictable), evictable)

    def _checked(self, victim, evictable):
        if victim is None:
            assert not any(map(evictable, self.resident))
        else:
            assert victim in self.resident
            assert evictable(victim)
        return victim


@pytest.mark.parametrize("name", policies.names())
@settings(max_examples=40, deadline=None)
@given(
    batches=BATCHES,
    num_slots=st.integers(4, 12),
    guesses=st.randoms(use_true_random=False),
    mixed=st.booleans(),
)
def test_every_policy(name, batches, num_slots, guesses, mixed):
    """It evicts only what is resident and evictable, and finds a victim whenever there is one."""
    cache = residency(name, batches, num_slots, (2, 3, 2) if mixed else (1, 1, 1))
    spy = Spy(cache.policy)
    cache = Residency(cache.space, spy)
    for keys in batches:
        slots, _ = cache.lookup(keys)
        assert len(set(slots)) == len(keys)
        assert all(key in cache for key in keys)
        assert all(cache.slot(key) == slot for key, slot in zip(keys, slots, strict=True))
        wanted = [ExpertKey(guesses.randrange(3), guesses.randrange(10)) for _ in range(3)]
        loaded = cache.guess(list(dict.fromkeys(wanted)), 2, keys)
        assert all(key in cache for key in [*keys, *loaded])
        if loaded and guesses.random() < 0.3:
            cache.cancel(loaded[0])
        if guesses.random() < 0.1:
            cache.drop(keys[0])
        assert spy.resident == set(cache._slots)
        assert cache.used == sum(cache.space.blob_bytes[key.layer] for key in spy.resident)
        assert cache.used <= cache.space.capacity
        in_use = [*cache._slots.values(), *cache.vacated, *cache._unused]
        assert sorted(in_use) == list(range(cache.space.num_slots))
    stats = cache.stats
    assert stats.hits + stats.misses == sum(map(len, batches))
    assert stats.prefetches >= stats.prefetches_used + stats.prefetches_wasted


@pytest.mark.parametrize("name", policies.online())
@settings(max_examples=60, deadline=None)
@given(batches=BATCHES, num_slots=st.integers(4, 12))
def test_belady_is_an_upper_bound(name, batches, num_slots):
    best, other = (residency(n, batches, num_slots) for n in ("belady", name))
    for keys in batches:
        best.demand(keys)
        other.demand(keys)
    assert best.stats.hits >= other.stats.hits


@pytest.mark.parametrize("name", policies.names())
def test_decisions_can_be_repeated(name):
    rng = random.Random(3)
    batches = [[ExpertKey(step % 3, e) for e in rng.sample(range(10), 3)] for step in range(300)]
    outcomes = []
    for _ in range(2):
        cache = residency(name, batches)
        outcomes.append([cache.lookup(keys) for keys in batches])
    assert outcomes[0] == outcomes[1]


def cycle(num_tokens, num_layers=3, top_k=2):
    """The same experts at every token: what a cache is good at, if it holds a token cycle."""
    token = [[ExpertKey(layer, e) for e in range(top_k)] for layer in range(num_layers)]
    return token * num_tokens


@pytest.mark.parametrize(("name", "hits"), [("lru", False), ("layer_lru", True)])
def test_below_one_token_cycle(name, hits):
    batches = cycle(20)
    cache = residency(name, batches, num_slots=4)
    for keys in batches:
        cache.demand(keys)
    assert (cache.stats.hits > 0) == hits


def test_lfu_keeps_what_is_used_most():
    cache = residency("lfu", [], num_slots=2)
    a, b, c = (ExpertKey(0, e) for e in range(3))
    for key in (a, a, b, c, b, c, c):
        cache.demand([key])
    assert c in cache
    assert a not in cache or b not in cache


def test_layers_keep_their_shares():
    """A layer that uses many experts does not push out those of the others."""
    few, many = ExpertKey(0, 0), [ExpertKey(1, e) for e in range(10)]
    cache = residency("layer_lru", [], num_slots=6)
    cache.demand([few])
    for key in many * 3:
        cache.demand([key])
    assert few in cache


def test_keep_last_keeps_the_latest_batch_of_every_layer():
    cache = residency("keep_last", [], num_slots=7)
    rng = random.Random(0)
    latest = {}
    for step in range(200):
        keys = [ExpertKey(step % 3, e) for e in rng.sample(range(10), 2)]
        cache.demand(keys)
        latest[step % 3] = keys
        assert all(key in cache for batch in latest.values() for key in batch)


def test_keep_last_does_not_give_up_what_the_rest_of_a_prompt_wants():
    """A prompt wants all experts of each layer, of which a quarter has to be read; hardly any of
    the others leaves before its layer has come."""
    num_layers, num_experts, num_slots = 8, 12, 72
    cache = residency("keep_last", [], num_slots, (1,) * num_layers)
    rng = random.Random(0)
    for _ in range(50):
        for layer in range(num_layers):
            cache.demand([ExpertKey(layer, e) for e in rng.sample(range(num_experts), 2)])
    before = cache.stats.copy()
    for layer in range(num_layers):
        cache.demand([ExpertKey(layer, e) for e in range(num_experts)])
    got = cache.stats - before
    missing = num_layers * num_experts - num_slots
    assert got.hits + got.misses == num_layers * num_experts
    assert missing <= got.misses <= missing + 3  # those that the first layer took from others


@pytest.mark.parametrize("name", ["keep_last", "lru", "layer_lru", "lfu", "slru"])
def test_of_a_prompt_what_a_layer_asked_for_last_stays(name):
    """Experts are fetched in an order that relies on it: see tiered.experts.group_by_expert."""
    num_layers, num_experts = 4, 12
    cache = residency(name, [], 24, (1,) * num_layers)
    for layer in range(num_layers):
        cache.demand([ExpertKey(layer, expert) for expert in range(num_experts)])
    for layer in range(num_layers):
        there = [expert for expert in range(num_experts) if ExpertKey(layer, expert) in cache]
        assert there == list(range(num_experts - len(there), num_experts))


def test_names_come_from_the_folder():
    wanted = "lru lfu lfu_decay slru arc layer_lru layer_lfu least_stale random belady keep_last"
    assert set(policies.names()) >= set(wanted.split())
    with pytest.raises(ValueError, match=r"choose one of .*layer_lfu"):
        policies.create("fifo", Space(4, (1,) * 2))
    with pytest.raises(ValueError, match="future"):
        policies.create("belady", Space(4, (1,) * 2))


def test_a_policy_of_ones_own(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "class First:\n"
        "    def __init__(self, space): self.keys = {}\n"
        "    def touch(self, key): self.keys[key] = None\n"
        "    def forget(self, key): del self.keys[key]\n"
        "    def victim(self, evictable): return next(filter(evictable, self.keys), None)\n"
    )
    cache = residency(f"{file}:First", [])
    for key in (ExpertKey(0, e) for e in range(9)):
        cache.demand([key])
    assert cache.stats.evictions == 3
    space = Space(4, (1,) * 2)
    made = policies.create(type(cache.policy), space)
    assert type(made) is type(cache.policy)
    for spec, message in [
        (f"{file}:Missing", "no class 'Missing'"),
        (f"{tmp_path}/no.py:X", "no Python"),
    ]:
        with pytest.raises(ValueError, match=message):
            policies.create(spec, space)


def test_a_policy_that_evicts_what_is_not_there():
    class Wrong:
        def touch(self, key): ...
        def forget(self, key): ...
        def victim(self, evictable):
            return ExpertKey(2, 9)

    cache = Residency(Space(1, (1,) * 3), Wrong())
    cache.demand([ExpertKey(0, 0)])
    with pytest.raises(RuntimeError, match="not resident"):
        cache.demand([ExpertKey(0, 1)])
