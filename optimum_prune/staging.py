"""An output folder that is whole, or is not there."""

from __future__ import annotations

import errno
import os
import re
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from optimum_prune.errors import OutputError

CANNOT_WRITE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENAMETOOLONG)


@dataclass
class Staging:
    """Where a run writes until it is done."""

    root: Path
    result: Path
    """The folder inside `root` that becomes the output."""


@contextmanager
def staged(output: Path, overwrite: bool, source: str | None = None) -> Iterator[Staging]:
    """A hidden folder beside `output`, whose `result` is moved into place when the block ends without an error.

    What an earlier run that was killed left there is removed.

    Args:
        source: the model's folder, which the output must not replace.

    Raises:
        OutputError: the output exists and may not be overwritten, or cannot be written.
    """
    output = Path(os.path.abspath(output))
    check_output(output, overwrite, source)
    root = output.parent / f".{output.name}.partial-{socket.gethostname()}-{os.getpid()}"
    try:
        _remove_abandoned(output)
        _make(root / "model", output)
        staging = Staging(root, root / "model")
        yield staging
        check_output(output, overwrite, source)  # it may have appeared meanwhile
        _move_into_place(staging.result, output, root)
    except OSError as error:
        if error.errno in CANNOT_WRITE:
            raise OutputError(
                f"The output {output} cannot be written: {error.strerror}. Name an --output elsewhere."
            ) from error
        raise
    finally:
        shutil.rmtree(root, ignore_errors=True)


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


def _make(folder: Path, output: Path) -> None:
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise OutputError(
            f"The output {output} cannot be written: {error.strerror}. Name an --output elsewhere."
        ) from error


def _remove_abandoned(output: Path) -> None:
    """Removes what runs of this machine that are no more left beside the output."""
    pattern = re.compile(re.escape(f".{output.name}.partial-{socket.gethostname()}-") + r"(\d+)")
    for folder in output.parent.iterdir() if output.parent.is_dir() else ():
        match = pattern.fullmatch(folder.name)
        if match and not _runs(int(match[1])):
            shutil.rmtree(folder, ignore_errors=True)


def _runs(process: int) -> bool:
    if process == os.getpid():
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _move_into_place(result: Path, output: Path, root: Path) -> None:
    if output.exists():
        output.rename(root / "replaced")
    result.rename(output)
