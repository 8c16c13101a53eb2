"""Files that a person names: `~` means the home folder, and what is no file that can be read is said before it is opened."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from optimum_prune.errors import RecipeError, shown

PIPES = ("/dev/fd/", "/dev/stdin", "/proc/self/fd/")
"""Where the system shows what a shell connected: a pipe there ends, and one with a name of its own may never."""


def path_of(name: str | os.PathLike[str]) -> Path:
    """The path that a name means, `~` and `~user` included where they are known."""
    path = Path(name)
    try:
        return path.expanduser()
    except RuntimeError:  # no home folder is known: it is a name like any other
        return path


def named(given: object, what: str) -> Path:
    """The path that is given to a function of the library.

    Args:
        what: is called so, for the message.

    Raises:
        RecipeError: something else is given.
    """
    if not isinstance(given, (str, os.PathLike)):
        raise RecipeError(
            f"The {what} is given as {shown(given)}, which is no name of a folder. Give its name as a text or a Path."
        )
    return path_of(given)


def is_there(path: Path) -> bool:
    """Whether there is something of that name, which may be no name that any file can have."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def flaw(path: Path, *, piped: bool = False) -> str:
    """Why a path is no file that can be read, as the end of a sentence, such as "does not exist"; empty if it is one.

    Args:
        piped: whether a pipe from the shell will do, which can be read once.
    """
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return "is a link that leads nowhere" if path.is_symlink() else "does not exist"
    except OSError as error:
        return f"cannot be reached ({error.strerror})"
    except ValueError:  # a NUL character
        return "has a name that no file can have"
    if stat.S_ISDIR(mode):
        return "is a folder"
    if not stat.S_ISREG(mode) and not (piped and str(path).startswith(PIPES)):
        return "is no file but a pipe or a device, which may never end"
    return "" if os.access(path, os.R_OK) else "may not be read (Permission denied)"


def is_folder(path: Path) -> bool:
    """Whether it is a folder that can be looked into, and not a whole disk."""
    try:
        return path.is_dir() and path.resolve().parent != path.resolve() and os.access(path, os.R_OK | os.X_OK)
    except (OSError, ValueError):
        return False


def files_below(folder: Path) -> Iterator[Path]:
    """The files in a folder and in those below it; hidden ones, and what cannot be read, are left out."""
    for place, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        below = (Path(place) / name for name in files if not name.startswith("."))
        yield from (file for file in below if not flaw(file))


def beginning(path: Path, size: int) -> bytes:
    """The first bytes of a file, at most so many.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        return file.read(size)


def mapping_in(file: Path) -> dict[str, Any]:
    """What a JSON file says; nothing if it cannot be read, or holds something else than an object."""
    try:
        plain = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except (OSError, ValueError, RecursionError):
        return {}
    return plain if isinstance(plain, dict) else {}
