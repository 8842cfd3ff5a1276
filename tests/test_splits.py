"""Where misses are computed: balanced by costs, unless tokens come faster by a plan that never
changes."""

import logging

import numpy as np
import pytest

from tiered import Engine
from tiered.demo import random_tiny_model
from tiered.gpu.splits import BALANCED, PLANS, Balanced, Governed, govern
from tiered.planning.costs import Costs, Line, Miss

MISSES = [Miss(1e6)] * 8
PROMPT = np.random.default_rng(0).integers(3, 256, 21).tolist()


def costs_of(cpu, link):
    """GB/s; a GPU takes no time."""
    return Costs(
        Line(0, 1e-15, 1e6), Line(0, 1e-9 / cpu, 1e6), Line(0, 1e-9 / link, 1e6), Line(0, 1e-9, 1e6)
    )


def test_each_plan_places_as_it_is_called():
    costs = costs_of(cpu=30, link=10)
    split = Governed(costs)
    assert split.place(0, MISSES) == Balanced(costs).place(0, MISSES) == 2
    for plan, copied in enumerate((0, 4, 2, 8)):
        split.choice = type("Choice", (), {"limit": lambda self, plan=plan: plan})()
        assert split.place(0, MISSES) == copied
    assert len(PLANS) == 4 and split.place(0, []) == 0


def test_what_costs_call_far_slower_is_not_tried():
    split = Governed(costs_of(cpu=30, link=10))
    for _ in range(20):
        split.place(0, MISSES)
    assert split.is_near(BALANCED) and not split.is_near(3)  # 0.8 ms against 0.2
    assert not split.is_near(1) and not split.is_near(0)  # 0.4 and 0.27 ms
    governor = govern([split])
    for _ in range(1000):
        governor.add(1.0)
        assert governor.limit() == BALANCED


@pytest.mark.parametrize("quicker", [1, 3])
def test_a_plan_that_never_changes_is_used_while_it_is_quicker(quicker, caplog):
    splits = [Governed(costs_of(cpu=10, link=10)) for _ in range(2)]
    for split in splits:
        split.is_near = lambda plan: True  # whatever costs say of it
    governor, speeds = govern(splits), [1.3, 1.2, 1.0, 1.2]
    speeds[quicker] = 0.9
    with caplog.at_level(logging.INFO, "tiered"):
        for _ in range(800):
            governor.add(speeds[governor.limit()])
    assert governor.chosen == quicker
    assert caplog.messages == [
        f"computing of misses is now {PLANS[quicker]}: a token takes 900.0 ms with it and "
        "1000.0 ms with balanced"
    ]
    speeds[quicker] = 1.1
    for _ in range(2000):
        governor.add(speeds[governor.limit()])
    assert governor.chosen == BALANCED
    assert all(split.choice is governor for split in splits)


def test_an_engine_s_tokens_are_the_same_by_every_plan(tmp_path):
    model = random_tiny_model(tmp_path / "model")
    texts = []
    for plan in (None, *range(len(PLANS))):
        with Engine(model, device="sim:rtx4060ti-16gb", threads=2) as engine:
            share, blob = engine.shares[0], max(engine.store.blob_bytes)
            vram = str(share.fixed + share.kv + 3 * blob)
        with Engine(model, device="sim:rtx4060ti-16gb", threads=2, vram=vram) as engine:
            for placed in engine.decoder.source.cards:
                assert isinstance(placed.split, Governed)
                if plan is not None:
                    placed.split.choice = type("C", (), {"limit": lambda self, plan=plan: plan})()
            texts.append(list(engine.generate_tokens(PROMPT, 60)))
            copies, computed = placed.copies, placed.computed_in_ram
            if plan == 0:
                prompt = copies
                assert computed > 0
            elif plan == 3:
                assert copies > prompt
    assert texts[1:] == texts[:1] * len(PLANS)
