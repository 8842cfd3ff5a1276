"""What all tests share."""

import os
import signal
import threading

import pytest

from tiered import cli

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


# Shells start background jobs with SIGINT ignored, and so would be what tests interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def tiered(capsys):
    """Run a command: (exit status, standard output, standard error)."""

    def run(*arguments):
        status = 0
        try:
            cli.main([str(argument) for argument in arguments])
        except SystemExit as end:
            status = end.code or 0
        out, err = capsys.readouterr()
        return status, out, err

    return run


@pytest.fixture(scope="module")
def one_torch_thread():
    """Tiny tensors are sooner computed than handed out to threads, which others need."""
    torch = pytest.importorskip("torch")

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


OURS = ("tiered-", "cpu_kernels-")


def our_threads():
    """The threads that Tiered has started, over all engines that live."""
    return {thread for thread in threading.enumerate() if thread.name.startswith(OURS)}


@pytest.fixture(scope="module", autouse=True)
def no_thread_is_left():
    """Whatever a module of tests opens, it closes: a thread that stays is an engine that leaks."""
    before = our_threads()
    yield
    left = our_threads() - before
    for thread in left:
        thread.join(2)
    assert not [thread.name for thread in left if thread.is_alive()]
