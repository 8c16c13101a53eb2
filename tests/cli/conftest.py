from __future__ import annotations

import signal

import pytest

from optimum_prune.cli.main import main


@pytest.fixture(autouse=True)
def _signals():
    """`main` listens for SIGTERM; the tests' own process should not go on doing so."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def cli(capsys):
    """Runs a command in this process: exit code, stdout, stderr."""

    def run(*arguments):
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as exit:
            code = exit.code
        captured = capsys.readouterr()
        return code or 0, captured.out, captured.err

    return run


@pytest.fixture
def work(tmp_path):
    """An empty folder to write to."""
    folder = tmp_path / "work"
    folder.mkdir()
    return folder
