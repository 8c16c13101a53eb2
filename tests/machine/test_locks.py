from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

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


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"{}", b'{"host": 3, "process": "x"}', b"[" * 300])
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


def test_a_process_that_slept_knows_that_it_was_taken_for_dead(file, without_locks):
    with lock(file, "x") as held:
        assert held()
        file.write_text('{"host": "elsewhere", "process": 1, "number": 7}')
        assert not held()
    assert file.exists()  # it is the other's


def test_a_lock_that_somebody_removed_is_not_held(file):
    with lock(file, "x") as held:
        file.unlink()
        assert not held()
        with lock(file, "x") as other:
            assert other()
        assert not file.exists()


def test_two_that_come_at_once_where_a_disk_has_no_locks_are_one(file, without_locks):
    outcomes = []

    def run():
        try:
            with lock(file, "x"):
                time.sleep(1)
            outcomes.append("held")
        except OutputError:
            outcomes.append("refused")

    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["held", "refused", "refused"]


def make_link(file):
    file.with_name("precious").write_text("precious")
    file.symlink_to("precious")


@pytest.mark.parametrize(
    "make", [make_link, os.mkfifo, Path.mkdir, lambda file: file.write_text("precious" * 100)], ids=range(4)
)
def test_what_is_no_lock_is_left_alone(make, file, tmp_path):
    make(file)
    with pytest.raises(OutputError, match=r"\.out\.lock .*[Rr]ename it"), lock(file, "x"):
        raise AssertionError
    assert file.is_symlink() or file.exists()
    assert all(each.read_text().startswith("precious") for each in tmp_path.iterdir() if each.is_file())
