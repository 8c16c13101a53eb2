"""Output folders: whole, or not there. A run writes into a hidden folder beside the output, which takes its place at the end."""

from __future__ import annotations

import errno
import os
import re
import shutil
import socket
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from optimum_prune.errors import OutputError
from optimum_prune.machine import processes
from optimum_prune.machine.locks import lock
from optimum_prune.machine.processes import runs
from optimum_prune.run.ownership import check_replaceable

CANNOT_WRITE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENAMETOOLONG)
"""Numbers of the system's errors that another output would spare."""


@dataclass
class HiddenOutput:
    """The hidden folder beside an output into which a run writes until it is done."""

    folder: Path
    """For whatever the run writes; gone at its end."""
    result: Path
    """What becomes the output; a pass that writes another checkpoint puts that in its place."""


@contextmanager
def hidden_output(output: Path, overwrite: bool, inputs: Sequence[Path] = ()) -> Iterator[HiddenOutput]:
    """A hidden folder beside `output`, whose `result` is moved there when the block ends without an error.

    One run at a time is at work on an output. What an earlier run that was killed left there is removed. Of several processes,
    the first does all this, and ends the block when all others have.

    Args:
        inputs: files and folders that the run reads, which the output must not replace.

    Raises:
        OutputError: the output exists and may not be overwritten, another run is at work on it, or it cannot be written.
    """
    if not processes.first():
        hidden = processes.broadcast_from_first(lambda: HiddenOutput(output, output))
        if not hidden.folder.is_dir():
            raise OutputError(
                f"The output {output} is on a disk that process {processes.rank()} does not see. Name an --output that all machines share."
            )
        yield hidden
        processes.wait()
        return
    output = Path(os.path.abspath(output))
    try:
        with ExitStack() as stack:
            stack.enter_context(_alone_at(output))
            _mend_abandoned(output)
            check_output(output, overwrite, inputs)
            folder = _make_hidden(output, "partial")
            stack.callback(shutil.rmtree, folder, ignore_errors=True)
            (folder / "model").mkdir()
            hidden = processes.broadcast_from_first(lambda: HiddenOutput(folder, folder / "model"))
            yield hidden
            processes.wait()  # others may still read the result
            _finish(hidden.result, output, overwrite, inputs)
    except OSError as error:
        if error.errno in CANNOT_WRITE:
            raise OutputError(
                f"The output {output} cannot be written: {error.strerror}. Name an --output elsewhere."
            ) from error
        raise


def _alone_at(output: Path) -> AbstractContextManager[None]:
    """The lock of an output, in a hidden file beside it."""
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"The output {output} cannot be written: {error.strerror}. Name an --output elsewhere."
        ) from error
    return lock(output.with_name(f".{output.name}.lock"), f"The output {output} cannot be written")


def check_output(output: Path, overwrite: bool, inputs: Sequence[Path] = ()) -> None:
    """Refuses an output folder that must not be written.

    Raises:
        OutputError: it exists without `overwrite`, or holds what this program did not write, or what this run reads.
    """
    output = Path(os.path.abspath(output))
    if not os.path.lexists(output):
        return
    if not overwrite:
        raise OutputError(
            f"The output {output} exists already. Name another --output, or replace it with --overwrite."
        )
    check_replaceable(output, inputs)


def _finish(result: Path, output: Path, overwrite: bool, inputs: Sequence[Path]) -> None:
    """Moves the result into place; where something has appeared meanwhile that must not be replaced, beside it."""
    try:
        check_output(output, overwrite, inputs)
        _move_into_place(result, output)
    except (OutputError, OSError) as error:
        beside = next(place for number in count(1) if not os.path.lexists(place := _beside(output, number)))
        result.rename(beside)
        why = (
            str(error)
            if isinstance(error, OutputError)
            else f"The output {output} cannot be written: {error.strerror}."
        )
        raise OutputError(f"{why} What was made is whole, and lies in {beside}.") from error


def _beside(output: Path, number: int) -> Path:
    return output.with_name(f"{output.name}.finished{'' if number == 1 else f'-{number}'}")


def _hidden_prefix(output: Path, kind: str) -> str:
    return f".{output.name}.{kind}-{socket.gethostname()}-"


def _make_hidden(output: Path, kind: str) -> Path:
    """An empty folder beside the output whose name tells machine and process."""
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix=f"{_hidden_prefix(output, kind)}{os.getpid()}-", dir=output.parent))
    except OSError as error:
        raise OutputError(
            f"The output {output} cannot be written: {error.strerror}. Name an --output elsewhere."
        ) from error


def _mend_abandoned(output: Path) -> None:
    """Removes what runs that are no more left beside the output, and puts back what they had replaced.

    Who holds the lock of an output is its only run, so whatever else lies there under our names is of runs that ended, on whatever
    host.
    """
    for kind in ("replaced", "partial"):
        pattern = re.compile(re.escape(f".{output.name}.{kind}-") + r"(.+)-(\d+)-[a-z0-9_]+")
        for folder in sorted(output.parent.iterdir()):
            match = pattern.fullmatch(folder.name)
            if match is None or folder.is_symlink() or not _is_ours(folder):
                continue
            if match[1] == socket.gethostname() and int(match[2]) != os.getpid() and runs(int(match[2])):
                continue  # of a version without locks, or of a process that has its number by chance
            if kind == "replaced" and not os.path.lexists(output) and (folder / output.name).is_dir():
                (folder / output.name).rename(output)
            shutil.rmtree(folder, ignore_errors=True)


def _is_ours(folder: Path) -> bool:
    """Whether a folder belongs to this user."""
    return folder.is_dir() and (not hasattr(os, "getuid") or folder.stat().st_uid == os.getuid())


def _move_into_place(result: Path, output: Path) -> None:
    """Renames the result to the output. What it replaces is removed only when the result is there."""
    if not os.path.lexists(output):
        result.rename(output)
        return
    aside = _make_hidden(output, "replaced")
    output.rename(aside / output.name)
    try:
        result.rename(output)
    except BaseException:
        (aside / output.name).rename(output)
        aside.rmdir()
        raise
    shutil.rmtree(aside, ignore_errors=True)
