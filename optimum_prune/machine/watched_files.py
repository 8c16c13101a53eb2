"""Files of weights that are read for as long as a run lasts, and whether somebody has changed them meanwhile.

Weights are mapped from their files, in memory too where they are loaded in the dtype that they are stored in. It is looked whether the
files are as they were before each layer runs and before each tensor is written. One that is cut short within the milliseconds between
that and the end of the layer ends the process with a bus error of the system, and no sentence: Python runs no handler of its own before
the instruction that failed is tried again. To be safe from that too, weights would have to be copied out of the map, which takes
memory that the system cannot take back. What was kept by then is whole, and the same command goes on from there.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

from optimum_prune.errors import CheckpointError, printable

WEIGHTS = (".safetensors", ".bin", ".gguf")
"""How the names of files with weights end."""


class WatchedFile(NamedTuple):
    """A file, and what tells whether it is as it was when this was made."""

    path: Path
    state: tuple[int, int, int]

    @classmethod
    def of(cls, path: Path) -> WatchedFile:
        """A file as it is now.

        Raises:
            OSError: it is not there.
        """
        return cls(path.absolute(), _state(path))

    def check(self) -> None:
        """Refuses to read on in a file that is not what it was: what was cut off would end the process when it is read.

        Raises:
            CheckpointError: it was changed, replaced or removed.
        """
        try:
            same = _state(self.path) == self.state
        except FileNotFoundError:
            raise CheckpointError(self._gone()) from None
        except OSError:
            same = False
        if not same:
            raise CheckpointError(
                f"The weights file {printable(str(self.path))} was changed while it was read. Run it again when it is as it should be."
            )

    def _gone(self) -> str:
        """That it is gone, or its folder with it."""
        folder = self.path.parent
        what = (
            f"weights file {printable(str(self.path))}"
            if folder.is_dir()
            else f"model's folder {printable(str(folder))}"
        )
        return f"The {what} was removed while it was read. Put it back, and run it again."


def watched(place: Path) -> tuple[WatchedFile, ...]:
    """The weights in a folder or a file; none if it is neither."""
    files = [place] if place.is_file() else sorted(place.iterdir()) if place.is_dir() else []
    return tuple(WatchedFile.of(file) for file in files if file.suffix in WEIGHTS and file.is_file())


def _state(path: Path) -> tuple[int, int, int]:
    about = os.stat(path)  # noqa: PTH116 - once for each layer
    return about.st_ino, about.st_size, about.st_mtime_ns
