"""What copies and the processor take is measured while they run, alone and while both do."""

from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest

from tiered.experts import ExpertKey
from tiered.gpu.busy import Busy, Channel
from tiered.gpu.uploads import Uploads
from tiered.planning.costs import Costs, Line, Miss


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def test_what_runs_side_by_side_counts_once():
    clock = Clock()
    busy = Busy(clock)
    with busy.running():
        clock.now = 1.0
        with busy.running():
            clock.now = 2.0
        assert busy() == 2.0
        clock.now = 3.0
    clock.now = 10.0
    assert busy() == 3.0


def test_a_request_is_told_without_what_it_waited_for_others():
    clock, told = Clock(), []
    channel = Channel(lambda *what: told.append(what), Busy(clock))
    first, second = channel.request(10), channel.request(20)
    first.__enter__()
    second.__enter__()  # queued at the same moment
    clock.now = 1.0
    first.__exit__(None, None, None)
    clock.now = 3.0
    second.__exit__(None, None, None)
    assert told == [(10, 1.0, 0.0), (20, 2.0, 0.0)]
    assert channel.busy() == 3.0


def test_the_rivals_share_of_a_request_is_told():
    clock, told = Clock(), []
    cpu = Busy(clock)
    channel = Channel(lambda *what: told.append(what), cpu)
    with channel.request(10):
        clock.now = 1.0
        with cpu.running():
            clock.now = 4.0
    assert told == [(10, 4.0, 0.75)]


def test_a_request_that_failed_tells_nothing():
    clock, told = Clock(), []
    channel = Channel(lambda *what: told.append(what), Busy(clock))
    with pytest.raises(OSError, match="aborted"), channel.request(10):
        clock.now = 1.0
        raise OSError("aborted")
    assert told == []
    assert channel.busy() == 1.0


def test_a_link_that_slows_down_moves_work_to_the_processor():
    """And a link that is slower only while the processor computes is known as that."""
    nbytes = 1e6
    free = Line(0.0, 1e-15, nbytes)
    costs = Costs(free, Line(0.0, 1 / 10e9, nbytes), Line(0.0, 1 / 12e9, nbytes), free)
    clock = Clock()
    cpu = Busy(clock)
    channel = Channel(costs.observe_link, cpu)

    def copy(bandwidth, computing):
        with channel.request(nbytes):
            if computing:
                with cpu.running():
                    clock.now += nbytes / bandwidth
            else:
                clock.now += nbytes / bandwidth

    misses = [Miss(nbytes)] * 8
    before = costs.balance(0, misses)
    for _ in range(300):
        copy(12e9, computing=False)
        copy(6e9, computing=True)
    assert costs.link(nbytes) == pytest.approx(nbytes / 12e9, rel=0.1)
    assert costs.link_slowdown == pytest.approx(2.0, rel=0.1)
    assert costs.balance(0, misses) < before


@pytest.mark.parametrize(("is_there", "expected"), [(True, 3.0), (False, 1.0)])
def test_a_copy_takes_as_long_as_its_way_through_ram(is_there, expected):
    """From RAM to the staging buffer and to the card; but not what had to be read from disk."""
    now, seen = [0.0], []

    class Below:
        def __contains__(self, key):
            return is_there

        @contextmanager
        def lent(self, key, buffer):
            now[0] += 2.0
            yield buffer

    class Memory:
        def blob_bytes(self, key):
            return 1

        def staging(self):
            return nullcontext(SimpleNamespace(host=None))

        def upload(self, key, slot, blob, staging):
            now[0] += 1.0

    rival = Busy(lambda: now[0])
    link = Channel(lambda nbytes, seconds, overlap: seen.append(seconds), rival)
    Uploads(Below(), Memory(), link).read_into(ExpertKey(0, 0), SimpleNamespace(number=0))
    assert seen == [expected]
