import threading

import numpy as np
import pytest
from numba import carray, njit, types
from numba.extending import intrinsic

from cpu_kernels.chain import MOST_LINKS, OF_ROUTER, Chain
from cpu_kernels.team import (
    NUM_COUNTERS,
    Team,
    barrier,
    next_task,
    op,
    part_of,
    parts_of,
    share,
)


@intrinsic
def as_pointer(typingctx, address):
    def generate(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return types.CPointer(types.int64)(types.int64), generate


@njit
def words(address, count):
    return carray(as_pointer(address), (count,))


@op
def nothing(record, thread, num_threads, team):
    pass


@op
def count_calls(record, thread, num_threads, team):
    words(record, 64)[thread] += 1


@op
def pass_values_around(record, thread, num_threads, team):
    """record: number of rounds, then one word per thread; each round adds the neighbour's word."""
    memory = words(record, 1 + 2 * num_threads)
    for round in range(memory[0]):
        source = 1 + (round % 2) * num_threads
        target = 1 + (1 - round % 2) * num_threads
        neighbour = (thread + 1) % num_threads
        memory[target + thread] = memory[source + thread] + memory[source + neighbour]
        barrier(team)


@op
def take_tasks(record, thread, num_threads, team):
    """record: number of tasks, then one word per task and counter, counting who did it."""
    memory = words(record, 1 + words(record, 1)[0] * NUM_COUNTERS)
    num_tasks = memory[0]
    for counter in range(NUM_COUNTERS):
        task = next_task(team, counter)
        while task < num_tasks:
            memory[1 + counter * num_tasks + task] += 1
            task = next_task(team, counter)


@op
def append_digit(record, thread, num_threads, team):
    """record: a digit, and the address of a number for each thread, which it becomes the end of."""
    numbers = words(words(record, 2)[1], num_threads)
    numbers[thread] = 10 * numbers[thread] + words(record, 2)[0]


def team_threads():
    return [t for t in threading.enumerate() if t.name.startswith("cpu_kernels-")]


@pytest.mark.parametrize("num_threads", [1, 2, 3, 5])
@pytest.mark.parametrize("spin_microseconds", [0, 1, 200])
def test_every_thread_runs_every_op(num_threads, spin_microseconds):
    # Without spinning each run has to wake the workers, and races with their falling asleep.
    memory = np.zeros(64, np.int64)
    with Team(num_threads, spin_microseconds) as team:
        for _ in range(2000):
            team.run(count_calls.address, memory.ctypes.data)
    assert memory.tolist() == [2000] * num_threads + [0] * (64 - num_threads)


@pytest.mark.parametrize("num_threads", [1, 2, 3])
def test_barriers_separate_rounds(num_threads):
    num_rounds = 30
    values = list(range(1, num_threads + 1))
    memory = np.array([num_rounds, *values, *values], np.int64)
    for _ in range(num_rounds):
        values = [values[t] + values[(t + 1) % num_threads] for t in range(num_threads)]
    with Team(num_threads) as team:
        team.run(pass_values_around.address, memory.ctypes.data)
    assert memory[1 : 1 + num_threads].tolist() == values


@pytest.mark.parametrize("num_threads", [1, 2, 3])
def test_each_task_is_done_once_in_every_op(num_threads):
    num_tasks = 100
    memory = np.zeros(1 + num_tasks * NUM_COUNTERS, np.int64)
    memory[0] = num_tasks
    with Team(num_threads) as team:
        for _ in range(20):
            team.run(take_tasks.address, memory.ctypes.data)
    assert (memory[1:] == 20).all()


def test_shares_cover_all_tasks():
    for total in (0, 1, 2, 3, 10, 11):
        for num_threads in (1, 2, 3, 7):
            shares = [share.py_func(total, t, num_threads) for t in range(num_threads)]
            assert [i for lo, hi in shares for i in range(lo, hi)] == list(range(total))


def test_callers_take_turns():
    memory = np.zeros(64, np.int64)

    def call_often():
        for _ in range(300):
            team.run(count_calls.address, memory.ctypes.data)

    with Team(2, spin_microseconds=1) as team:
        callers = [threading.Thread(target=call_often) for _ in range(4)]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join()
    assert memory[:2].tolist() == [1200, 1200]


def test_threads_are_gone_after_close():
    for num_threads, spin_microseconds in ((1, 200), (2, 0), (4, 200)):
        team = Team(num_threads, spin_microseconds)
        assert len(team_threads()) == num_threads - 1
        team.run(nothing.address, 0)
        team.close()
        team.close()
        assert team_threads() == []
        with pytest.raises(ValueError, match="closed"):
            team.run(nothing.address, 0)


def test_close_without_a_run():
    Team(3).close()
    assert team_threads() == []


def test_an_interrupted_run_leaves_the_team_usable(monkeypatch):
    memory = np.zeros(64, np.int64)
    with Team(2) as team:

        def started_then_interrupted(address, function, record):
            from cpu_kernels.team import _start

            _start(address, function, record)
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(team, "_run_if_awake", started_then_interrupted)
            with pytest.raises(KeyboardInterrupt):
                team.run(count_calls.address, memory.ctypes.data)
        team.run(count_calls.address, memory.ctypes.data)
    assert memory[:2].tolist() == [2, 2]


@pytest.mark.parametrize("arguments", [(0,), (-1,), (100_000,), (2, -1.0)])
def test_impossible_teams_are_refused(arguments):
    with pytest.raises(ValueError, match="not"):
        Team(*arguments)


@pytest.mark.parametrize("num_threads", [1, 2, 3])
def test_chained_ops_run_in_order_each_with_all_tasks(num_threads):
    num_tasks, digits = 100, [1, 2, 3, 4, 5] * 3
    tasks, numbers = np.zeros(1 + num_tasks * NUM_COUNTERS, np.int64), np.zeros(64, np.int64)
    tasks[0] = num_tasks
    records = [np.array([digit, numbers.ctypes.data]) for digit in digits]
    with Team(num_threads) as team:
        chain = Chain(team)
        with chain.opened():
            for record in records:
                chain.queue(take_tasks.address, tasks.ctypes.data)
                chain.queue(append_digit.address, record.ctypes.data, OF_ROUTER)
            chain.run(take_tasks.address, tasks.ctypes.data)
            assert (tasks[1:] == len(digits) + 1).all()  # what waited has run, too
            chain.queue(take_tasks.address, tasks.ctypes.data)
        seconds = chain.take_seconds()
    assert (tasks[1:] == len(digits) + 2).all()
    assert set(numbers[:num_threads].tolist()) == {int("".join(map(str, digits)))}
    assert {part for part, spent in seconds.items() if spent > 0} == {"router", "experts"}
    assert chain.take_seconds() == {}


@pytest.mark.parametrize("num_threads", [1, 2])
def test_long_chains_run_as_they_grow(num_threads):
    memory = np.zeros(64, np.int64)
    with Team(num_threads) as team, (chain := Chain(team)).opened():
        for _ in range(5 * MOST_LINKS // 2):
            chain.queue(count_calls.address, memory.ctypes.data)
        assert memory[0] == 2 * MOST_LINKS


def test_a_chain_that_an_error_ends_leaves_nothing_behind():
    memory = np.zeros(64, np.int64)
    with Team(2) as team:
        chain = Chain(team)
        with pytest.raises(KeyError), chain.opened():
            chain.queue(count_calls.address, memory.ctypes.data)
            raise KeyError
        chain.queue(count_calls.address, memory.ctypes.data)  # out of a chain: at once
        assert memory[:2].tolist() == [1, 1]


def test_what_waits_is_run_before_memory_changes():
    memory = np.zeros(64, np.int64)
    with Team(2) as team, (chain := Chain(team)).opened():
        chain.queue(count_calls.address, memory.ctypes.data)
        assert memory[0] == 0
        chain.finish()
        assert memory[:2].tolist() == [1, 1]


@njit
def all_parts(team, total):
    num_parts = parts_of(team, total)
    return [part_of(team, total, i, num_parts) for i in range(num_parts)]


@pytest.mark.parametrize("num_threads", [1, 2, 3, 8])
def test_parts_cover_all_work_and_become_smaller(num_threads):
    with Team(num_threads) as team:
        for total in (0, 1, 5, 31, 32, 1000, 12345):
            parts = all_parts(team._address, total)
            assert [i for lo, hi in parts for i in range(lo, hi)] == list(range(total))
            if total >= 1000 and num_threads > 1:
                sizes = [hi - lo for lo, hi in parts]
                assert max(sizes) * num_threads <= total and sizes[-1] * len(parts) < total
