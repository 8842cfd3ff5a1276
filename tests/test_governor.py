import logging

import pytest

from tiered.governor import Governor


class Clock:
    """Steps take `with_it` seconds while the governor allows look-ahead, else `without`."""

    def __init__(self, with_it, without):
        self.with_it, self.without = with_it, without
        self.now = 0.0
        self.governor = Governor(8, window=4, clock=lambda: self.now)

    def run(self, num_steps):
        limits = []
        for _ in range(num_steps):
            self.governor.begin()
            limits.append(self.governor.limit())
            self.now += self.with_it if self.governor.on else self.without
            self.governor.end()
            self.now += 5.0  # whoever reads the text takes time
        return limits


def test_it_starts_with_look_ahead_on():
    assert set(Clock(1, 1).run(4)) == {8}


def test_off_when_it_costs_more_than_it_saves(caplog):
    clock = Clock(with_it=1.3, without=1.0)
    with caplog.at_level(logging.INFO, "tiered"):
        clock.run(40)
    assert not clock.governor.chosen
    assert clock.governor.benefit == pytest.approx(-0.3)
    assert "look-ahead is now off: a token takes 1300.0 ms with it and 1000.0 ms without" in (
        caplog.messages
    )


def test_on_when_it_helps():
    clock = Clock(with_it=0.8, without=1.0)
    limits = clock.run(400)
    assert clock.governor.chosen
    assert clock.governor.benefit == pytest.approx(0.2)
    assert limits.count(0) < 0.2 * len(limits)  # probes become rare
    assert limits[200:].count(0) < 0.06 * 200


def test_it_changes_its_mind():
    clock = Clock(with_it=1.3, without=1.0)
    clock.run(60)
    assert not clock.governor.chosen
    clock.with_it = 0.7
    clock.run(600)
    assert clock.governor.chosen


def test_differences_within_the_margin_change_nothing():
    clock = Clock(with_it=1.02, without=1.0)
    clock.run(500)
    assert clock.governor.chosen


def test_one_lucky_probe_changes_nothing():
    """It has to win twice in a row."""
    clock = Clock(with_it=1.0, without=1.0)
    clock.run(4)
    clock.without = 0.5
    clock.run(4)  # the probe
    clock.without = 1.0
    clock.run(200)
    assert clock.governor.chosen
