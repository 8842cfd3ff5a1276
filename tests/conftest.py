"""What all tests share."""

import os

import pytest

from tiered import cli

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


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
