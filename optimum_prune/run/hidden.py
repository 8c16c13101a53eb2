"""Hidden folders beside an output, in which a run works; each carries a mark, without which nothing is taken for ours."""

from __future__ import annotations

import os
import re
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from optimum_prune.errors import OutputError
from optimum_prune.machine.processes import runs

MARK = "of-optimum-prune"
"""A file in every hidden folder."""
MARKED = "A run of optimum-prune works in this folder. The next run with the same output removes it if this one is no more.\n"
"""What it says."""


def make_hidden(output: Path, kind: str) -> Path:
    """A folder beside the output with nothing in it but our mark, whose name tells machine and process."""
    prefix = f".{output.name}.{kind}-{socket.gethostname()}-{os.getpid()}-"
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=prefix, dir=output.parent))
        try:
            (folder / MARK).write_text(MARKED, encoding="utf-8")
        except BaseException:
            remove_hidden(folder)
            raise
    except OSError as error:
        raise OutputError(
            f"The output {output} cannot be written: {error.strerror}. Name an --output elsewhere."
        ) from error
    return folder


def remove_hidden(folder: Path) -> None:
    """Removes a hidden folder, the mark last: whenever that is broken off, what is left is known as ours."""
    with suppress(OSError):
        for entry in folder.iterdir():
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry, ignore_errors=True)
            elif entry.name != MARK:
                entry.unlink()
        if [entry.name for entry in folder.iterdir()] == [MARK]:
            (folder / MARK).unlink()
        folder.rmdir()


def left_hidden(output: Path, kind: str) -> Iterator[tuple[Path, bool]]:
    """Hidden folders of a kind beside an output that runs which are no more left there, each with whether that was on this host.

    Who holds the lock of an output is its only run, so whatever else lies there under our names, with our mark, is of runs that
    ended, on whatever host.
    """
    pattern = re.compile(re.escape(f".{output.name}.{kind}-") + r"(.+)-(\d+)-[a-z0-9_]+")
    for folder in sorted(output.parent.iterdir()):
        match = pattern.fullmatch(folder.name)
        if match is None or not _is_ours(folder):
            continue
        here = match[1] == socket.gethostname()
        if here and int(match[2]) != os.getpid() and runs(int(match[2])):
            continue  # of a process that has its number by chance
        yield folder, here


def _is_ours(folder: Path) -> bool:
    """Whether a folder belongs to this user and carries our mark, or has nothing in it: a run may be killed before it marks it."""
    if folder.is_symlink() or not folder.is_dir() or (hasattr(os, "getuid") and folder.stat().st_uid != os.getuid()):
        return False
    mark = folder / MARK
    try:
        if not os.path.lexists(mark):
            return not any(folder.iterdir())
        return not mark.is_symlink() and mark.is_file() and MARKED.startswith(mark.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False


def discard(folder: Path, output: Path) -> None:
    """Removes a folder beside an output or in one: whole, or, if that takes longer than this process lives, it gets a name that tells that it
    is to be removed.
    """
    if not folder.is_dir():
        return
    try:
        aside = make_hidden(output, "partial")
    except OutputError:
        shutil.rmtree(folder, ignore_errors=True)
        return
    try:
        with suppress(OSError):
            folder.rename(aside / folder.name)
        remove_hidden(aside)
    finally:  # an interrupt comes once
        remove_hidden(aside)
        shutil.rmtree(folder, ignore_errors=True)
