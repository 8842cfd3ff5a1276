import logging

import pytest

from tiered.governor import Governor, Governors, depths


class Clock:
    """Steps take `with_it` seconds while the governor allows look-ahead, else `without`."""

    def __init__(self, with_it, without):
        self.with_it, self.without = with_it, without
        self.now = 0.0
        self.governor = Governor((0, 8), window=4)
        self.governors = Governors([self.governor], clock=lambda: self.now)

    def run(self, num_steps):
        limits = []
        for _ in range(num_steps):
            self.governors.begin()
            limits.append(self.governor.limit())
            self.now += self.with_it if self.governor.limit() else self.without
            self.governors.end()
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


# --- several limits, several governors ---


class SlowDisk:
    """A machine as numbers: a token's reads are spread over so many at a time, each slowed by the
    others; a guess takes its time from demand, and saves a share of what demand would take."""

    def __init__(self, slowed, saved, guessing, readers=8, most_guesses=6):
        self.slowed = slowed  # share of its own time that one read loses to each other
        self.saved, self.guessing = saved, guessing  # shares of the time that demand takes
        self.now = 0.0
        self.look_ahead = Governor((0, most_guesses), "look-ahead", window=4)
        self.depth = Governor(depths(readers), "read depth", window=4)
        self.governors = Governors([self.look_ahead, self.depth], clock=lambda: self.now)

    def step(self, guesses, depth):
        demand = 24 * (1 + self.slowed * (depth - 1)) / depth
        return 5 + demand * (1 + bool(guesses) * (self.guessing - self.saved))

    def run(self, num_steps):
        used = []
        for _ in range(num_steps):
            limits = self.look_ahead.limit(), self.depth.limit()
            used.append(limits)
            self.governors.begin()
            self.now += self.step(*limits)
            self.governors.end()
        return used

    @property
    def chosen(self):
        return self.look_ahead.chosen, self.depth.chosen


def test_depths():
    assert [depths(most) for most in (1, 2, 4, 6)] == [[1], [1, 2], [1, 2, 4], [1, 3, 6]]


@pytest.mark.parametrize("slowed", [0.1, 0.5, 1.5, 3.0])
@pytest.mark.parametrize(("saved", "guessing"), [(0.5, 0.1), (0.1, 0.5)])
def test_each_finds_what_is_best(slowed, saved, guessing):
    """A disk whose reads hinder each other gets one at a time, another one all that there are."""
    disk = SlowDisk(slowed, saved, guessing)
    disk.run(1000)
    settings = [(g, d) for g in disk.look_ahead.limits for d in disk.depth.limits]
    best = min(settings, key=lambda setting: disk.step(*setting))
    assert disk.step(*disk.chosen) <= 1.03 * disk.step(*best)
    assert disk.look_ahead.chosen == (6 if saved > guessing else 0)
    assert disk.depth.chosen == (8 if slowed < 1 else 1)


def test_read_depth_goes_down_step_by_step_and_up_again(caplog):
    disk = SlowDisk(slowed=2.0, saved=0.5, guessing=0.1, readers=4)
    with caplog.at_level(logging.INFO, "tiered"):
        disk.run(400)
        assert disk.chosen == (6, 1)
        disk.slowed = 0.0
        disk.run(2000)
    assert disk.chosen == (6, 4)
    changes = [message for message in caplog.messages if message.startswith("read depth")]
    now = [message.split(":")[0].split()[-1] for message in changes]
    assert now == ["2", "1", "2", "4"]
    assert changes[0].endswith("ms with 4")
    assert not any(message.startswith("look-ahead") for message in caplog.messages)


def test_only_one_compares_at_a_time_and_probes_become_rare():
    disk = SlowDisk(slowed=0.5, saved=0.3, guessing=0.1)
    used = disk.run(3000)
    assert all(guesses == 6 or depth == 8 for guesses, depth in used)
    assert used[1500:].count((6, 8)) > 0.9 * 1500
    assert {limits for limits in used} == {(6, 8), (0, 8), (6, 4)}


def test_whoever_has_no_choice_has_no_turn():
    only, other = Governor(depths(1), "read depth"), Governor((0, 1))
    assert list(Governors([only, other])) == [other]
    nobody = Governors([])
    nobody.begin()
    nobody.end()
    assert only.limit() == 1


def test_the_first_probe_can_wait():
    governor = Governor((1, 2), "read depth", window=2, patience=3)
    used = [(governor.limit(), governor.add(1.0)) for _ in range(8)]
    assert used == [(2, False)] * 6 + [(1, False), (1, True)]


def test_what_is_not_worth_a_try_is_passed_over():
    governor = Governor((0, 1, 2, 3), window=1, start=2, is_worth_trying={0, 2}.__contains__)
    used = []
    for _ in range(40):
        used.append(governor.limit())
        governor.add((0.5, 9.0, 1.0, 9.0)[governor.limit()])
    assert set(used) == {0, 2} and governor.chosen == 0
