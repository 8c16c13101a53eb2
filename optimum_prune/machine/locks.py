"""A lock that is held: by one run at a time, whatever becomes of its process, its host's clock, or its host."""

from __future__ import annotations

import errno
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from optimum_prune.errors import OutputError

UNKNOWN_TO_DISK = (errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS)
"""What a disk answers that has no locks."""
BEAT = 2.0
"""Seconds between the signs of life of who holds a lock on such a disk."""
PATIENCE = 5
"""So many signs must be missing before a lock there is nobody's."""


@contextmanager
def lock(file: Path, what: str) -> Iterator[None]:
    """Holds a lock for the time of a `with`, by a file that is gone afterwards.

    The system lets go of it when the process ends, however it ends. On a disk that has no locks, the holder writes a counter again
    and again, and others watch whether it moves; no clocks are compared.

    Args:
        what: what nobody else may do meanwhile, for the error.

    Raises:
        OutputError: somebody else holds it.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        fcntl = None  # type: ignore[assignment]
    while True:
        opened = os.open(file, os.O_CREAT | os.O_RDWR, 0o644)
        try:
            beats = fcntl is None or not _locked(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = _holder(file)
            os.close(opened)
            raise OutputError(f"{what}: {holder} is at work there. Wait for it, or name another --output.") from None
        except BaseException:
            os.close(opened)
            raise
        if _is_there(opened, file):
            break
        os.close(opened)  # its holder ended and removed it meanwhile
    if beats and _moves(file):
        holder = _holder(file)
        os.close(opened)
        raise OutputError(f"{what}: {holder} is at work there. Wait for it, or name another --output.")
    ended = threading.Event()
    _sign(file, 0)
    if beats:
        threading.Thread(target=_beat, args=(file, ended), daemon=True).start()
    try:
        yield
    finally:
        ended.set()
        with suppress(OSError):
            file.unlink()
        os.close(opened)


def _locked(opened: int, how: int) -> bool:
    """Whether the system's lock was taken; not on a disk that has none.

    Raises:
        BlockingIOError: somebody else has it.
    """
    import fcntl

    try:
        fcntl.flock(opened, how)
    except BlockingIOError:
        raise
    except OSError as error:
        if error.errno in UNKNOWN_TO_DISK:
            return False
        raise
    return True


def _is_there(opened: int, file: Path) -> bool:
    """Whether an open file is the one at a path."""
    try:
        return os.fstat(opened).st_ino == file.stat().st_ino
    except FileNotFoundError:
        return False


def _sign(file: Path, number: int) -> None:
    text = json.dumps({"host": socket.gethostname(), "process": os.getpid(), "number": number})
    with suppress(OSError):
        file.write_text(text, encoding="utf-8")


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _holder(file: Path) -> str:
    """Who holds a lock, as far as that can be read."""
    try:
        about = json.loads(_read(file))
        return f"process {int(about['process'])} on {str(about['host'])[:80]!r}"
    except (ValueError, KeyError, TypeError):
        return "another run"


def _moves(file: Path) -> bool:
    """Whether somebody goes on signing a file."""
    before = _read(file)
    for _ in range(PATIENCE if before else 0):
        time.sleep(BEAT)
        if _read(file) != before:
            return True
    return False


def _beat(file: Path, ended: threading.Event) -> None:
    number = 0
    while not ended.wait(BEAT):
        number += 1
        _sign(file, number)
