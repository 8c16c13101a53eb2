"""Output folders: whole, or not there. A run writes into a hidden folder beside the output, which takes its place at the end."""

from __future__ import annotations

import errno
import os
import re
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from optimum_prune.errors import OutputError
from optimum_prune.machine import processes
from optimum_prune.machine.processes import runs

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
def hidden_output(output: Path, overwrite: bool, source: str | None = None) -> Iterator[HiddenOutput]:
    """A hidden folder beside `output`, whose `result` is moved there when the block ends without an error.

    What an earlier run that was killed left there is removed. Of several processes, the first does all this, and ends the block when
    all others have.

    Args:
        source: the model's folder, which the output must not replace.

    Raises:
        OutputError: the output exists and may not be overwritten, or cannot be written.
    """
    if not processes.first():
        hidden = processes.broadcast_from_first(lambda: HiddenOutput(output, output))
        if not hidden.folder.is_dir():
            raise OutputError(
                f"The output {output} is on a disk that process {processes.rank()} does not see. Name an --output that all machines share."
            )
        yield hidden
        return
    output = Path(os.path.abspath(output))
    _mend_abandoned(output)
    check_output(output, overwrite, source)
    folder = _make_hidden(output, "partial")
    try:
        (folder / "model").mkdir()
        hidden = processes.broadcast_from_first(lambda: HiddenOutput(folder, folder / "model"))
        yield hidden
        check_output(output, overwrite, source)  # it may have appeared meanwhile
        _move_into_place(hidden.result, output)
    except OSError as error:
        if error.errno in CANNOT_WRITE:
            raise OutputError(
                f"The output {output} cannot be written: {error.strerror}. Name an --output elsewhere."
            ) from error
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def check_output(output: Path, overwrite: bool, source: str | None = None) -> None:
    """Refuses an output folder that must not be written.

    Raises:
        OutputError: it exists without `overwrite`, is no folder that we may replace, or touches the model's own folder.
    """
    output = Path(os.path.abspath(output))
    if not os.path.lexists(output):
        return
    if not overwrite:
        raise OutputError(
            f"The output {output} exists already. Name another --output, or replace it with --overwrite."
        )
    if source is not None and Path(source).exists():
        model = Path(source).resolve()
        if output.resolve() == model or output.resolve() in model.parents:
            raise OutputError(f"The output {output} holds the model that is to be compressed. Name another --output.")
    if (
        output.is_symlink()
        or not output.is_dir()
        or (any(output.iterdir()) and not (output / "config.json").is_file())
    ):
        raise OutputError(
            f"The output {output} is no folder with a model, so it is not overwritten. Name another --output."
        )


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
    """Removes what runs of this machine that are no more left beside the output, and puts back what they had replaced."""
    if not output.parent.is_dir():
        return
    for kind in ("replaced", "partial"):
        pattern = re.compile(re.escape(_hidden_prefix(output, kind)) + r"(\d+)-.*")
        for folder in sorted(output.parent.iterdir()):
            match = pattern.fullmatch(folder.name)
            if not match or runs(int(match[1])):
                continue
            if kind == "replaced" and not os.path.lexists(output) and (folder / output.name).is_dir():
                (folder / output.name).rename(output)
            shutil.rmtree(folder, ignore_errors=True)


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
