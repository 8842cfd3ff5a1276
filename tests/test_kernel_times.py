"""What kernels took is told once they have ended, in their order, and nobody waits."""

import pytest

from gpu_backend.kernel_times import PENDING, KernelTimes


def test_told_once_and_in_order():
    times, ended = KernelTimes(), {}
    for number in range(3):
        times.add(10 * number, lambda number=number: ended.get(number))
    assert times.take() == []
    ended[1] = 2.0
    assert times.take() == []  # the first ends first
    ended[0] = 1.0
    assert times.take() == [(0, 1.0), (10, 2.0)] and times.take() == []
    ended[2] = 0.5
    assert times.take() == [(20, 0.5)]


def test_what_nobody_asks_for_is_forgotten():
    times = KernelTimes()
    for number in range(PENDING + 5):
        times.add(number, lambda: 1.0)
    assert [nbytes for nbytes, _ in times.take()] == list(range(5, PENDING + 5))


def test_a_device_times_what_is_launched():
    pytest.importorskip("torch")
    from gpu_backend.device import TorchDevice

    device = TorchDevice("cpu")
    with device.timed(100.0):
        assert device.kernel_times.take() == []
    ((nbytes, seconds),) = device.kernel_times.take()
    assert nbytes == 100.0 and 0 <= seconds < 60
