"""A lock that is held: by one run at a time, whatever becomes of its process, its host's clock, or its host."""

from __future__ import annotations

import errno
import json
import os
import secrets
import socket
import stat
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from optimum_prune.errors import OutputError

UNKNOWN_TO_DISK = (errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS)
"""What a disk answers that has no locks."""
BEAT = 2.0
"""Seconds between the signs of life of who holds a lock on such a disk."""
SIGNED = 300
"""Bytes of a file that is signed: always the same, so that nobody reads half of it."""
PATIENCE = 5
"""So many signs must be missing before a lock there is nobody's."""


@contextmanager
def lock(file: Path, what: str) -> Iterator[Callable[[], bool]]:
    """Holds a lock for the time of a `with`, by a file that is gone afterwards.

    The system lets go of it when the process ends, however it ends. On a disk that has no locks, the holder writes a counter again
    and again, and others watch whether it moves; no clocks are compared.

    Args:
        what: what nobody else may do meanwhile, for the error.

    Yields:
        Whether it is held still: somebody may have removed the file, or taken a process that slept for dead.

    Raises:
        OutputError: somebody else holds it, or the file is not ours.
    """
    opened, beats = _opened(file, what)
    token = secrets.token_hex(8)
    ended = threading.Event()
    try:
        _sign(file, token, 0)
        if beats:
            time.sleep(BEAT)
            if not _is_of(file, token):  # two came at once, and the later has it
                raise _taken(file, what)
            threading.Thread(target=_beat, args=(file, token, ended), daemon=True).start()
        yield lambda: _is_there(opened, file) and _is_of(file, token)
    finally:
        ended.set()
        if _is_there(opened, file) and _is_of(file, token):
            with suppress(OSError):
                file.unlink()
        os.close(opened)


def _opened(file: Path, what: str) -> tuple[int, bool]:
    """The number of the open file of a lock that nobody else holds, and whether it is to be held by a sign of life."""
    while True:
        opened = _open(file)
        try:
            beats = not _locked(opened)
            if _is_there(opened, file):
                if os.fstat(opened).st_size > SIGNED:
                    raise OutputError(
                        f"{what}: {file} lies there and is no lock of ours, so it is left alone. Rename it."
                    )
                if beats and _moves(file):
                    raise _taken(file, what)
                return opened, beats
        except BlockingIOError:
            os.close(opened)
            raise _taken(file, what) from None
        except BaseException:
            os.close(opened)
            raise
        os.close(opened)  # its holder ended and removed it meanwhile


def _open(file: Path) -> int:
    try:
        opened = os.open(
            file, os.O_CREAT | os.O_RDWR | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0), 0o644
        )
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
            raise OutputError(
                f"{file} is no file of ours, and would be a lock. Rename it, or name another --output."
            ) from error
        raise
    if not stat.S_ISREG(os.fstat(opened).st_mode):
        os.close(opened)
        raise OutputError(f"{file} is no file of ours, and would be a lock. Rename it, or name another --output.")
    return opened


def _locked(opened: int) -> bool:
    """Whether the system's lock was taken; not on a disk, or a system, that has none.

    Raises:
        BlockingIOError: somebody else has it.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        return False
    try:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
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
        return os.path.samestat(os.fstat(opened), file.lstat())
    except FileNotFoundError:
        return False


def _sign(file: Path, token: str, number: int) -> None:
    about = {"host": socket.gethostname()[:80], "process": os.getpid(), "token": token, "number": number}
    with suppress(OSError), file.open("r+b") as signed:
        signed.write(json.dumps(about).encode().ljust(SIGNED))


def _read(file: Path) -> bytes:
    """What a file is signed with; nothing if it is not signed."""
    try:
        with file.open("rb") as signed:
            return signed.read(SIGNED).strip(b"\0 ")
    except OSError:
        return b""


def _about(file: Path) -> dict[str, Any]:
    """Who signed a file, as far as that can be read."""
    try:
        plain = json.loads(_read(file))
    except (ValueError, RecursionError):
        return {}
    return plain if isinstance(plain, dict) else {}


def _is_of(file: Path, token: str) -> bool:
    """Whether a file is signed by who has this token."""
    return _about(file).get("token") == token


def _taken(file: Path, what: str) -> OutputError:
    """The error that somebody else has a lock."""
    about, holder = _about(file), "another run"
    with suppress(ValueError, KeyError, TypeError):
        holder = f"process {int(about['process'])} on {str(about['host'])[:80]!r}"
    return OutputError(f"{what}: {holder} is at work there. Wait for it, or name another --output.")


def _moves(file: Path) -> bool:
    """Whether somebody goes on signing a file."""
    before = _read(file)
    for _ in range(PATIENCE if before else 0):
        time.sleep(BEAT)
        if _read(file) != before:
            return True
    return False


def _beat(file: Path, token: str, ended: threading.Event) -> None:
    number = 0
    while not ended.wait(BEAT) and _is_of(file, token):
        number += 1
        _sign(file, token, number)
