"""What a run that ended early had finished: a folder beside its output, from which the same run can go on.

`OUT.unfinished` holds the last checkpoint that was whole, with the artefacts made from it so far, and `state.json`, which says what
it is: on what model and text, by which passes, and what the report needs to know of them. That file is written last and at once, so
that whatever it names is whole.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optimum_prune.calibration import Calibration
from optimum_prune.errors import OptimumPruneError, OutputError, RecipeError

STATE = "state.json"
HEAD = 2**20
"""How much of a file of weights its fingerprint reads; safetensors begin with the names and shapes of all."""

Passes = Sequence[tuple[str, Mapping[str, Any]]]
"""Names and options of passes."""


@dataclass(frozen=True)
class Finished:
    """What `state.json` says."""

    checkpoint: Path
    passes: int
    """How many of the recipe's passes are done."""
    facts: Mapping[str, Any]
    """For the report."""


class Unfinished:
    """The folder beside an output that holds what is finished of a run.

    Args:
        output: the output folder.
        identity: what, beside the passes, must be equal for a run to go on where another stopped; each with the word for it. A None
            in it is equal to nothing.
    """

    def __init__(self, output: Path, identity: Mapping[str, str | None]) -> None:
        self.folder = output.absolute().with_name(f"{output.name}.unfinished")
        self._identity = dict(identity)

    def find(self, passes: Passes, resume: bool) -> Finished | None:
        """What is finished of these passes, if anything.

        Args:
            resume: whether the user insists that there is.

        Raises:
            RecipeError: the user insists, and there is nothing, or it is of another run.
            OutputError: another process is at work there.
        """
        state = self._read()
        if state is None:
            if resume:
                raise RecipeError(
                    f"There is nothing to go on from: {self.folder} does not hold a run. Leave --resume out."
                )
            return None
        self._check_owner(state)
        done = [(name, options) for name, options in state["passes"]]
        wanted = json.loads(json.dumps([list(step) for step in passes]))
        changed = [
            what for what, value in self._identity.items() if value is None or state["identity"].get(what) != value
        ]
        if [list(step) for step in done] != wanted[: len(done)]:
            changed.append("the options of the passes that are done")
        if not changed:
            return Finished(self.folder / state["checkpoint"], len(done), state["facts"])
        if resume:
            raise RecipeError(
                f"{self.folder} is of another run: {', '.join(changed)} changed. Run with what it was begun with, or leave --resume out to "
                f"begin anew."
            )
        return None

    def save(self, checkpoint: Path, passes: Passes, facts: Mapping[str, Any]) -> Path:
        """Moves a whole checkpoint here, unless it is here, and notes what it is.

        Returns:
            Where it is now.
        """
        self.folder.mkdir(exist_ok=True)
        place = checkpoint
        if checkpoint.parent != self.folder:
            place = self.folder / f"{len(passes)}-{checkpoint.name}"
            shutil.rmtree(place, ignore_errors=True)
            checkpoint.rename(place)
        state = {
            "identity": self._identity,
            "passes": [list(step) for step in passes],
            "checkpoint": place.name,
            "facts": facts,
            "process": [socket.gethostname(), os.getpid()],
        }
        partial = self.folder / f"{STATE}.partial"
        partial.write_text(json.dumps(state, indent=2), encoding="utf-8")
        partial.replace(self.folder / STATE)
        for entry in self.folder.iterdir():  # what the state no longer names
            if entry.is_dir() and entry != place:
                shutil.rmtree(entry, ignore_errors=True)
        return place

    def remove(self) -> None:
        """Removes the folder, when the run is done."""
        shutil.rmtree(self.folder, ignore_errors=True)

    @contextmanager
    def told(self) -> Iterator[None]:
        """Adds to an error that leaves this block what was kept, and how to go on."""
        try:
            yield
        except OptimumPruneError as error:
            if self._read() is None:
                raise
            raise type(error)(f"{error} {self._kept()}") from error
        except KeyboardInterrupt as error:
            if self._read() is None:
                raise
            raise KeyboardInterrupt(self._kept()) from error

    def _kept(self) -> str:
        state = self._read()
        assert state is not None
        done = ", ".join(name for name, _ in state["passes"])
        return (
            f"The checkpoint after {done or 'loading'} is kept in {self.folder / state['checkpoint']}; the same command, with the rest of "
            f"the recipe mended, goes on from there."
        )

    def _read(self) -> Any:
        try:
            state = json.loads((self.folder / STATE).read_text(encoding="utf-8"))
            whole = (self.folder / state["checkpoint"] / "config.json").is_file()
        except (OSError, ValueError, KeyError, TypeError):  # none, or damaged by something else
            return None
        return state if whole else None

    def _check_owner(self, state: Mapping[str, Any]) -> None:
        host, process = state["process"]
        if host != socket.gethostname() or process == os.getpid() or not runs(process):
            return
        raise OutputError(f"The process {process} is at work on {self.folder}. Wait for it, or name another --output.")


def runs(process: int) -> bool:
    """Whether a process of this machine is there."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def files_fingerprint(path: Path) -> str:
    """Of a weights file, or of the weights and config of a checkpoint's folder: their names, sizes, times and beginnings."""
    kinds = (".safetensors", ".bin", ".json", ".gguf")
    files = [path] if path.is_file() else sorted(file for file in path.iterdir() if file.suffix in kinds)
    digest = hashlib.sha256()
    for file in files:
        about = file.stat()
        digest.update(f"{file.name} {about.st_size} {about.st_mtime_ns} ".encode())
        with file.open("rb") as opened:
            digest.update(opened.read(HEAD))
    return digest.hexdigest()


def windows_fingerprint(windows: Calibration | None) -> str:
    """Of token windows."""
    if windows is None:
        return "none"
    digest = hashlib.sha256(str(tuple(windows.tokens.shape)).encode())
    digest.update(windows.tokens.cpu().numpy().tobytes())
    digest.update(windows.mask.cpu().numpy().tobytes())
    return digest.hexdigest()
