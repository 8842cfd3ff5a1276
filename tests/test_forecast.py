"""Forecasts: bounds that hold on any machine, and the ceilings that were computed by hand."""

from dataclasses import replace
from itertools import pairwise

import pytest

from tiered.planning import hardware, shapes, sizes
from tiered.planning.forecast import forecast, share_out
from tiered.planning.hardware import GB
from tiered.planning.prompt import distinct_experts, prompt_seconds
from tiered.planning.strategies import STRATEGIES
from tiered.planning.synthetic import Locality, locality_of, routing


def card(vram, **changes):
    """The card of the hand computation: 448 GB/s, PCIe 4 x16, DDR5."""
    machine = hardware.find("rtx4060ti-16gb").with_sizes(ram=64 << 30, vram=vram)
    return replace(machine, gpu=replace(machine.gpu, bandwidth=448.0, link=25.0, **changes))


def run(name, machine, **options):
    model = sizes.of_shape(shapes.find(name))
    return forecast(model, machine, share_out(model, machine, 4096), policy="lru", **options)


@pytest.mark.parametrize(
    ("name", "vram", "strategy", "expected"),
    [
        ("mixtral-8x7b", 16_000_000_000, "on-demand", 3.8),
        ("mixtral-8x7b", 16_000_000_000, "copy", 10.3),
        ("mixtral-8x7b", 16_000_000_000, "cpu", 8.5),
        ("mixtral-8x7b", 16_000_000_000, "fixed", 16.5),
        ("mixtral-8x7b", 16_000_000_000, "tiered", 17.7),
        ("mixtral-8x7b", 28_000_000_000, "tiered", 47.7),
        ("qwen3-30b-a3b", 8_000_000_000, "on-demand", 20),
        ("qwen3-30b-a3b", 8_000_000_000, "cpu", 43),
        ("qwen3-30b-a3b", 8_000_000_000, "copy", 104),
        ("qwen3-30b-a3b", 8_000_000_000, "tiered", 135),
    ],
)
def test_ceilings_of_an_independent_model(name, vram, strategy, expected):
    """Which copies from page-locked memory."""
    got = run(name, card(vram), strategy=strategy, mapped=False)
    assert got.tok_s == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize("name", ["mixtral-8x7b", "qwen3-30b-a3b"])
def test_what_passes_a_buffer_takes_longer(name):
    machine, speeds = card(12_000_000_000), []
    model = sizes.of_shape(shapes.find(name))
    assert model.staged(model.all_experts, 1 << 62) == 0
    assert model.staged(4 << 30, 1 << 30) == 0.75
    assert replace(model, largest=max(model.experts) + 1).staged(4 << 30, 1 << 62) == 1
    for options in ({"mapped": False}, {}):
        for strategy in ("copy", "half", "tiered", "cpu"):
            speeds.append(run(name, machine, strategy=strategy, **options).tok_s)
    locked, staged = speeds[:4], speeds[4:]
    assert locked[0] > 1.02 * staged[0] and locked[1] > 1.02 * staged[1]
    assert locked[2] >= staged[2]  # who may choose copies less then
    assert locked[3] == pytest.approx(staged[3], rel=0.01)  # it copies nothing


STATIC = [name for name in STRATEGIES if name != "tiered"]


def simulated(name, card, gib):
    """Tokens per second of each strategy, and of the best that never changes."""
    model, machine = sizes.of_shape(shapes.find(name)), hardware.find(card)
    machine = machine.with_sizes(vram=gib << 30, ram=64 << 30)
    layout = share_out(model, machine, 4096)
    speeds = {name: forecast(model, machine, layout, strategy=name).tok_s for name in STRATEGIES}
    return speeds["tiered"], max(speeds[name] for name in STATIC)


POINTS = [("mixtral-8x7b", "rtx3060-12gb", 10), ("mixtral-8x7b", "rtx4060ti-16gb", 16)]
MORE = [
    (name, card, gib)
    for name, sizes_of_cards in (("mixtral-8x7b", (4, 12)), ("qwen3-30b-a3b", (8,)))
    for card in hardware.names() if hardware.find(card).gpu is not None
    for gib in sizes_of_cards if gib << 30 <= hardware.find(card).gpu.vram
]  # fmt: skip


@pytest.mark.parametrize(
    "point", [*POINTS, *(pytest.param(point, marks=pytest.mark.slow) for point in MORE)]
)
def test_no_static_plan_is_quicker_on_any_card(point):
    """Within one percent: where nearly all experts fit, whoever never evicts can be a bit ahead."""
    ours, best = simulated(*point)
    assert ours >= 0.99 * best


def test_terms_add_up_and_it_says_that_it_is_simulated():
    got = run("olmoe-1b-7b", hardware.find("rtx4060-laptop").with_sizes(vram=3 << 30))
    assert sum(got.terms.values()) == pytest.approx(1 / got.tok_s)
    assert got.simulated and got.as_dict()["simulated"] is True
    assert min(got.terms.values()) >= 0


def test_no_faster_than_memory_allows():
    machine = hardware.find("desktop")
    model = sizes.of_shape(shapes.find("olmoe-1b-7b"))
    got = run("olmoe-1b-7b", machine)
    nbytes = model.active_experts + sum(model.attention) + model.head
    assert 0.5 < got.tok_s / (machine.host.bandwidth * GB / nbytes) < 1
    assert got.vram_hit_pct == 0 and got.read_bytes_per_token == 0


def test_a_model_larger_than_ram_waits_for_the_disk():
    machine = hardware.find("laptop").with_sizes(ram=3 << 30)
    model = sizes.of_shape(shapes.find("olmoe-1b-7b"))
    layout = share_out(model, machine, 1024)
    assert layout.needs_disk and not layout.on_gpu
    slow, fast = (
        forecast(
            model,
            replace(machine, disk=replace(machine.disk, bandwidth=bandwidth)),
            layout,
            policy="lru",
            look_ahead=0,
        )
        for bandwidth in (1.0, 4.0)
    )
    assert slow.read_bytes_per_token == fast.read_bytes_per_token > 0
    misses = model.active_experts * (1 - slow.ram_hit_pct / 100)
    assert slow.read_bytes_per_token == pytest.approx(misses)
    assert slow.terms["disk_wait"] > 2 * fast.terms["disk_wait"] > 0
    assert slow.tok_s < fast.tok_s


def test_more_memory_is_never_slower_and_a_full_card_is_best():
    speeds = [run("qwen3-30b-a3b", card(gib << 30)).tok_s for gib in (4, 8, 12, 20)]
    assert speeds == sorted(speeds)


def test_a_card_too_small_for_the_dense_weights_is_left_out():
    got = run("mixtral-8x7b", card(2 << 30))
    assert not got.layout.on_gpu and got.vram_hit_pct == 0
    assert got.tok_s == pytest.approx(run("mixtral-8x7b", hardware.find("desktop")).tok_s, rel=0.1)


def test_too_little_ram_names_the_number_that_would_work():
    model = sizes.of_shape(shapes.find("mixtral-8x7b"))
    with pytest.raises(MemoryError, match=r"needs .* at least"):
        share_out(model, hardware.find("laptop").with_sizes(ram=1 << 30), 4096)


def test_a_trace_instead_of_synthetic_routing():
    model = sizes.of_shape(shapes.find("olmoe-1b-7b"))
    machine = hardware.find("laptop").with_sizes(ram=3 << 30)
    layout = share_out(model, machine, 1024)
    same = [tuple(range(8))] * model.num_layers
    got = forecast(
        model, machine, layout, tokens=[same] * 20, prompt=same, policy="lru", look_ahead=0
    )
    assert got.ram_hit_pct == 100 and got.read_bytes_per_token == 0


def test_prompts():
    model = sizes.of_shape(shapes.find("qwen3-30b-a3b"))
    machine = hardware.find("rtx4060ti-16gb")
    layout = share_out(model, machine, 4096)
    short, long = (prompt_seconds(model, machine, layout, n) for n in (16, 2048))
    assert 0 < short < long
    desktop = hardware.find("desktop")
    assert prompt_seconds(model, desktop, share_out(model, desktop, 4096), 2048) > 5 * long
    assert distinct_experts(model, 1) == pytest.approx(model.top_k)
    assert distinct_experts(model, 10_000) == pytest.approx(model.num_experts)


def test_synthetic_routing_is_repeatable_distinct_and_local():
    many = routing(4, 64, 8, 200, locality_of(64))
    assert many == routing(4, 64, 8, 200, locality_of(64))
    assert many is not routing(4, 64, 8, 200, locality_of(64), seed=1)
    assert all(len(set(chosen)) == 8 for token in many for chosen in token)

    def repeats(tokens):
        pairs = [(set(a[0]), set(b[0])) for a, b in pairwise(tokens)]
        return sum(len(a & b) for a, b in pairs) / len(pairs) / 8

    none = routing(1, 64, 8, 400, Locality(0.0, 0.0))
    assert repeats(none) == pytest.approx(8 / 64, abs=0.03)
    assert repeats(many) > 0.35
    with pytest.raises(ValueError, match="typical"):
        locality_of(64, "huge")


def test_unknown_strategy():
    with pytest.raises(ValueError, match="on-demand"):
        run("olmoe-1b-7b", hardware.find("laptop"), strategy="magic")
