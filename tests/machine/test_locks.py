from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
import time

import pytest

from optimum_prune.errors import OutputError
from optimum_prune.machine import locks
from optimum_prune.machine.locks import lock

HOLD = "import sys, time, pathlib; from optimum_prune.machine.locks import lock\nwith lock(pathlib.Path(sys.argv[1]), 'x'):\n    print('held', flush=True)\n    time.sleep(60)"


@pytest.fixture
def file(tmp_path):
    return tmp_path / ".out.lock"


def test_one_at_a_time_in_one_process(file):
    with lock(file, "The output is locked"):
        with (
            pytest.raises(OutputError, match=rf"The output is locked: process {os.getpid()} on .* is at work there"),
            lock(file, "The output is locked"),
        ):
            raise AssertionError
        assert file.exists()
    assert not file.exists()
    with lock(file, "again"):
        pass


def test_one_at_a_time_in_two_processes_and_a_kill_lets_go(file):
    holder = subprocess.Popen([sys.executable, "-c", HOLD, file], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(OutputError, match=f"process {holder.pid}"), lock(file, "x"):
            raise AssertionError
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        holder.stdout.close()
    assert file.exists()
    with lock(file, "x"):
        pass
    assert not file.exists()


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"{}", b'{"host": 3, "process": "x"}', b"[" * 100_000])
def test_what_a_lock_file_holds_does_not_matter(content, file):
    file.write_bytes(content)
    with lock(file, "x"):
        pass


def test_an_error_lets_go(file):
    with pytest.raises(ValueError, match="mine"), lock(file, "x"):
        raise ValueError("mine")
    assert not file.exists()


@pytest.fixture
def without_locks(monkeypatch):
    """As on a disk that has none."""

    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    monkeypatch.setattr(locks, "BEAT", 0.1)


def test_where_a_disk_has_no_locks_signs_of_life_count(file, without_locks):
    with lock(file, "x"), pytest.raises(OutputError, match="is at work there"), lock(file, "x"):
        raise AssertionError
    file.write_text('{"host": "elsewhere", "process": 1, "number": 7}')
    started = time.monotonic()
    with lock(file, "x"):
        assert time.monotonic() - started < 5
