"""Three tiers and two devices on a fake GPU with a virtual clock: numbers, races, failures."""

from functools import partial

import numpy as np
import pytest
from fake_gpu import FakeCard, fake_gpu

from cpu_kernels.backend import CpuBackend
from gpu_backend.pieces import in_pieces
from tiered import Engine, policies
from tiered.demo import random_tiny_model
from tiered.experts import ExpertJobs, ExpertKey
from tiered.governor import Governor
from tiered.gpu.placement import PlacedExperts
from tiered.gpu.splits import Balanced, Fixed
from tiered.gpu.uploads import Uploads
from tiered.planning.admission import Admission
from tiered.planning.costs import Costs, Line, Miss
from tiered.policies import Space
from tiered.simulated.clock import VirtualClock
from tiered.tier import Tier

PROMPT = np.random.default_rng(0).integers(3, 256, 21).tolist()
NUM_TOKENS = 16


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return random_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def expected(model):
    with Engine(model, threads=2) as engine:
        return list(engine.generate_tokens(PROMPT, NUM_TOKENS))


class GpuEngine:
    """An engine on the fake GPU: RAM tier below, VRAM tier above, placement between them."""

    def __init__(self, model, device, num_slots, split=None, promote=True, ram=0.5):
        self.backend = FakeCard(CpuBackend(2), device)
        with Engine(model, threads=1) as probe:
            experts = probe.plan.experts
        budget = int(experts * ram)
        self.engine = Engine(model, backend=self.backend, expert_ram=budget, look_ahead=0)
        try:
            self._place(num_slots, split, promote)
        except BaseException:
            self.engine.close()
            raise

    def _place(self, num_slots, split, promote):
        store, config = self.engine.store, self.engine.config
        nbytes = max(store.blob_bytes)
        space = Space(num_slots * nbytes, tuple(nbytes for _ in store.blob_bytes))
        layouts = {layer: store.layouts(layer) for layer in config.sparse_layers}
        memory = self.backend.slots(space, layouts, config.num_experts)
        below = self.engine.source
        policy = policies.create("layer_lfu", space)
        self.tier = Tier(memory, Uploads(below.tier, memory), policy, loaders=3)
        costs = Costs.unknown(nbytes)
        self.source = PlacedExperts(
            self.tier,
            below,
            store,
            split or Balanced(costs),
            costs,
            few_rows=8,
            admission=Admission(space, costs) if promote else None,
            clock=self.backend.device.clock,
        )
        self.engine.decoder.source = self.source

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.tier.close()
        self.engine.close()

    def generate(self, num_tokens=NUM_TOKENS):
        return list(self.engine.generate_tokens(PROMPT, num_tokens))


SPLITS = {"gpu": Fixed(1), "half": Fixed(0.5), "cpu": Fixed(0), "balanced": None}


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("num_slots", [2, 5, 100])
def test_what_is_resident_and_where_it_runs_never_changes_the_tokens(
    model, expected, split, num_slots
):
    with GpuEngine(model, fake_gpu(), num_slots, SPLITS[split]) as gpu:
        assert gpu.generate() == expected
        assert gpu.generate() == expected  # another cache state


def test_a_layer_that_asks_for_nothing(model):
    with GpuEngine(model, fake_gpu(), 5) as gpu:
        nothing = np.empty(0, np.int32)
        assert all(len(ready) == 0 for ready, _ in gpu.source.fetch(0, nothing, nothing))
        assert all(len(ready) == 0 for ready, _ in gpu.source.fetch(1, nothing, np.zeros(1, int)))


def test_hits_run_on_the_gpu_and_misses_beside_it(model, expected):
    with GpuEngine(model, fake_gpu(), 100, Fixed(0)) as gpu:
        gpu.generate()
        assert gpu.backend.computed["cpu"] > 0  # nothing was there
        before = dict(gpu.backend.computed)
        gpu.generate()
        assert gpu.backend.computed["gpu"] > before["gpu"]  # what was promoted


def test_without_promotion_and_copies_the_gpu_stays_empty(model):
    short = PROMPT[:8]  # more rows per expert than the CPU does bit by bit would have to be copied
    with Engine(model, threads=1) as cpu:
        expected = list(cpu.generate_tokens(short, NUM_TOKENS))
    with GpuEngine(model, fake_gpu(), 4, Fixed(0), promote=False) as gpu:
        assert list(gpu.engine.generate_tokens(short, NUM_TOKENS)) == expected
        assert gpu.backend.device.num_copies == 0
        assert len(gpu.tier) == 0


def test_admission_is_told_of_every_pass(model):
    """Its counts fade, and its two rules are compared, token by token."""
    with GpuEngine(model, fake_gpu(), 5) as gpu:
        counts = gpu.source.admission.popularity
        growth, num_passes = counts.weight, []
        for _ in range(2):
            before = counts.weight
            gpu.generate()
            num_passes.append(round(np.log(counts.weight / before) / np.log1p(1 / 256)))
        assert growth == 1.0
        # The first pass of all follows none. One is the prompt's.
        assert num_passes == [NUM_TOKENS - 1, NUM_TOKENS]


def test_a_governor_can_turn_promotion_off(model):
    with GpuEngine(model, fake_gpu(), 100, Fixed(0)) as gpu:
        gpu.source.promotion = governor = Governor((0, 1), "promotion", window=1)
        governor.add(1.0)  # from now on it probes what is without
        assert governor.limit() == 0
        list(gpu.engine.generate_tokens(PROMPT[:8], NUM_TOKENS))
        assert gpu.backend.device.num_copies == 0
        governor.add(1.0)
        assert governor.limit() == 1
        list(gpu.engine.generate_tokens(PROMPT[:8], NUM_TOKENS))
        assert gpu.backend.device.num_copies > 0


def test_what_would_have_to_be_read_again_stays_on_the_gpu(model):
    """Where another may make room that RAM has, too."""
    with GpuEngine(model, fake_gpu(), 4, Fixed(0)) as gpu:
        first, *others = (ExpertKey(1, expert) for expert in range(4))
        ram, admission = gpu.engine.source.tier, gpu.source.admission
        for key in (first, *others):  # each evicts what is above from RAM
            gpu.tier.prefetch([key])
            list(gpu.tier.fetch([key]))
        for key in [key for key in ram.resident() if key.layer == 1]:
            ram.residency.drop(key)
        list(ram.fetch([others[1]]))
        assert [key in ram for key in (first, *others)] == [False, False, True, False]
        list(gpu.engine.source.fetch(0, np.array([0], np.int32)))
        admission.recent_wins = True  # worth a place, but no read
        list(gpu.source.fetch(0, np.array([0], np.int32)))
        there = gpu.tier.resident()
        assert ExpertKey(0, 0) in there and others[1] not in there
        assert {first, others[0], others[2]} <= set(there)


def test_a_copy_on_demand_takes_the_place_of_what_is_in_ram_too(model, expected):
    with GpuEngine(model, fake_gpu(), 5, Fixed(1), promote=False, ram=0.6) as gpu:
        tokens, left = gpu.engine.generate_tokens(PROMPT, NUM_TOKENS), []
        got = [next(tokens)]  # a prompt has it all streamed
        ram, residency = gpu.engine.source.tier, gpu.tier.residency
        leave, before = residency._leave, residency.stats.evictions

        def watched(key):
            left.append(key in ram)
            leave(key)

        residency._leave = watched
        got += tokens
        assert got == expected and left and all(left)
        assert residency.stats.evictions - before == len(left)


def test_the_table_names_what_is_in_the_slots(model):
    with GpuEngine(model, fake_gpu(), 5, Fixed(1)) as gpu:
        gpu.generate()
        table = gpu.tier.memory.table
        residency = gpu.tier.residency
        for layer, expert in np.argwhere(table >= 0).tolist():
            key = ExpertKey(layer, expert)
            if key in residency:
                assert residency.slot(key) == table[layer, expert]
        assert sum(ExpertKey(*key) in residency for key in np.argwhere(table >= 0)) == len(gpu.tier)


@pytest.mark.parametrize("copies", [[0], [3, 4], [10]])
def test_an_aborted_copy_is_an_error_and_leaves_everything_usable(model, expected, copies):
    device = fake_gpu(fail_copies=copies)
    with GpuEngine(model, device, 5, Fixed(1)) as gpu:
        with pytest.raises(OSError, match=r"expert \d+ of layer \d+.*aborted"):
            gpu.generate()
        device.fail_copies.clear()
        assert gpu.generate() == expected


def test_overwriting_a_slot_that_is_being_read_is_found(model):
    device = fake_gpu(bandwidth=1e6)  # kernels take long
    device.synchronizes = False
    with GpuEngine(model, device, 2, Fixed(1)) as gpu, pytest.raises(OSError, match="race"):
        gpu.generate()


def test_reading_a_slot_before_its_copy_has_ended_is_found():
    device = fake_gpu()
    staging = device.staging(64)

    def then(blob, slot):
        pass

    ticket = device.upload(staging.host, staging, 64, partial(then, slot=0))
    with pytest.raises(RuntimeError, match="race"):
        device.kernel(64, 0, slots=[0])
    device.wait(ticket)
    device.kernel(64, 0, slots=[0])


def test_bytes_arrive_when_their_time_has_come():
    device, arrived = fake_gpu(link=1e6, latency=1e-3), []
    staging = device.staging(1000)
    staging.host[:] = 7

    def then(blob, slot):
        arrived.append((slot, int(blob[0])))

    tickets = [
        device.upload(staging.host, staging, 1000, partial(then, slot=slot)) for slot in (0, 1)
    ]
    assert tickets == pytest.approx([2e-3, 4e-3])  # one after the other
    device.clock.advance_to(1.9e-3)
    assert arrived == []
    device.wait(tickets[1])
    assert arrived == [(0, 7), (1, 7)]


def test_too_little_vram_is_refused_with_the_numbers(model):
    with pytest.raises(MemoryError, match=r"expert slots takes \d+ bytes, and \d+ are free"):
        GpuEngine(model, fake_gpu(vram=1 << 18), 100)


def test_a_balanced_split_ends_both_sides_together():
    nbytes = 1e6
    link, cpu = 1 / 20e9, 1 / 60e9
    costs = Costs(Line(0, 1e-15, nbytes), Line(0, cpu, nbytes), Line(0, link, nbytes),
                  Line(0, 1e-9, nbytes))  # fmt: skip
    misses = [Miss(nbytes)] * 8
    assert Balanced(costs).place(0, misses) == 2  # m * P / (P + C) = 8 * 20 / 80
    assert Balanced(costs).place(0, misses, wait=1.0) == 0
    assert Balanced(costs).place(0, []) == 0


def placed(gpu, starts, link):
    """Which of experts 0, 1, ... of the first layer, with rows by `starts`, go to the GPU, where a
    copy takes `link` times what the CPU takes for one row, and each further row a tenth of that."""
    nbytes, costs = max(gpu.engine.store.blob_bytes), gpu.source.costs
    costs.cpu, costs.row = Line(0, 1e-9, nbytes), 0.1e-9
    costs.link, costs.gpu = Line(0, link * 1e-9, nbytes), Line(0, 1e-15, nbytes)
    experts = np.arange(len(starts) - 1, dtype=np.int32)
    groups = [
        (list(positions), addresses[:, 0] >= 1 << 62)
        for positions, addresses in gpu.source.fetch(0, experts, np.array(starts))
    ]
    assert sorted(p for positions, _ in groups for p in positions) == experts.tolist()
    return {p for positions, here in groups for p in positions if here.all()}


def test_a_short_prompt_stays_where_its_experts_are_and_a_long_one_is_copied(model):
    with GpuEngine(model, fake_gpu(), 5, promote=False) as gpu:
        assert placed(gpu, [0, 1, 2], link=4) == set()
        assert placed(gpu, [0, 4, 8], link=4) == set()  # two times 1.3, at once
        assert placed(gpu, [0, 100, 101, 102], link=4) == {0}
    with GpuEngine(model, fake_gpu(), 5, promote=False) as gpu:
        assert placed(gpu, [0, 100, 200], link=4) == {0, 1}
        costs = gpu.source.costs
        costs.cpu, costs.row = Line(0, 1e-9, 1), 0.1e-9
        assert costs.work(10, 1, 8) == 10
        assert costs.work(10, 17, 8) == pytest.approx(10 * (3 + 14 * 0.1))


def test_more_than_fits_is_copied_piece_by_piece_if_that_is_sooner(model):
    with GpuEngine(model, fake_gpu(), 2, promote=False) as gpu:
        # The CPU would be done with the last expert while three are copied; two fit at once.
        assert placed(gpu, [0, 100, 200, 300, 400], link=8) == {0, 1, 2, 3}
    with GpuEngine(model, fake_gpu(), 2, promote=False) as gpu:
        assert len(placed(gpu, [0, 4, 8, 12, 16], link=2)) < 4


def test_pieces_have_all_pairs_in_order():
    experts, starts = np.array([4, 6, 7], np.int32), np.array([2, 3, 10, 10], np.int32)
    jobs = ExpertJobs(experts, starts, np.arange(10, dtype=np.int32))
    addresses = np.arange(9).reshape(3, 3)
    same = in_pieces(addresses, jobs, 7)
    assert same[0] is addresses and same[1] is jobs
    got, pieces = in_pieces(addresses, jobs, 3)
    assert pieces.experts.tolist() == [4, 6, 6, 6]
    assert pieces.starts.tolist() == [2, 3, 6, 9, 10]
    assert np.array_equal(got, addresses[[0, 1, 1, 1]]) and pieces.pairs is jobs.pairs


def test_a_virtual_clock_runs_effects_in_order():
    clock, seen = VirtualClock(), []
    for time in (3.0, 1.0, 2.0):
        clock.at(time, lambda time=time: seen.append((time, clock.now)))
    clock.advance_to(2.5)
    assert seen == [(1.0, 1.0), (2.0, 2.0)] and clock() == 2.5
