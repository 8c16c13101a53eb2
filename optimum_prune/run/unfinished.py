"""What is finished of a run that ended early: a folder beside its output, from which the same run can go on.

`OUT.unfinished` holds the last checkpoint that was whole, with the artefacts made from it so far, and `state.json`, which says what
it is: on what model and text, by which passes, and what the report needs to know of them. That file is written last and at once, so
that whatever it names is whole.

Before there is such a checkpoint, while passes change the model in memory, the folder holds the journal of that, with a `begun.json`
which says of what.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optimum_prune.errors import OptimumPruneError, OutputError, RecipeError
from optimum_prune.machine.processes import runs, started_at
from optimum_prune.run.journal import Journal

STATE = "state.json"
"""In the folder: what its checkpoint is."""
JOURNAL, BEGUN = "journal", "begun.json"
"""In the folder: that of the journal, and in this, what it is of."""
CLOCKS = 60.0
"""Seconds by which the clocks of processes and files may disagree."""

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
        self._journal: Journal | None = None
        self._saved = False

    def find(self, passes: Passes, resume: bool) -> Finished | None:
        """What is finished of these passes, if there is a checkpoint; there may be a journal.

        Args:
            resume: whether to refuse what is of another run, instead of beginning anew.

        Raises:
            RecipeError: it is of another run, and is to be gone on with.
            OutputError: another process is at work there.
        """
        state, begun = self._read(), self._begun()
        there = [known for known in (state, begun) if known is not None]
        self._check_owner(STATE, state)
        self._check_owner(f"{JOURNAL}/{BEGUN}", begun)
        fitting = [known for known in there if not self._changed(known, passes)]
        if state in fitting:
            self._saved = True
            return Finished(self.folder / state["checkpoint"], len(state["passes"]), state["facts"])
        if resume and there and not fitting:
            changed = self._changed(there[-1], passes)
            raise RecipeError(
                f"{self.folder} is of another run: {', '.join(changed)} changed. Run with what it was begun with, or leave --resume out to "
                f"begin anew."
            )
        return None

    def journal(self, passes: Passes) -> Journal | None:
        """The journal of these passes on the model in memory: the one that is here if it is theirs, else an empty one in its place.

        Returns:
            None if nobody could go on from it, since nothing tells whether the model is the same.

        Raises:
            OutputError: another process is at work there.
        """
        if None in self._identity.values():
            return None
        folder, begun = self.folder / JOURNAL, self._begun()
        self._check_owner(f"{JOURNAL}/{BEGUN}", begun)
        if begun is None or self._changed(begun, passes):
            shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
        self._journal = Journal(folder)
        _write(folder / BEGUN, self._known(passes))
        return self._journal

    def _known(self, passes: Passes) -> dict[str, Any]:
        """What tells whether another run may go on from here, and who is at work."""
        return {
            "identity": self._identity,
            "passes": [list(step) for step in passes],
            "process": [socket.gethostname(), os.getpid()],
        }

    def _changed(self, known: Mapping[str, Any], passes: Passes) -> list[str]:
        """What differs between what is here and what is asked for."""
        changed = [
            what for what, value in self._identity.items() if value is None or known["identity"].get(what) != value
        ]
        there, wanted = known["passes"], json.loads(json.dumps([list(step) for step in passes]))
        if there != wanted[: len(there)]:
            changed.append("the options of its passes")
        return changed

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
        _write(self.folder / STATE, {**self._known(passes), "checkpoint": place.name, "facts": facts})
        self._journal, self._saved = None, True
        for entry in self.folder.iterdir():  # what the state no longer names
            if entry.is_dir() and entry != place:
                shutil.rmtree(entry, ignore_errors=True)
        return place

    def remove(self) -> None:
        """Removes the folder, when the run is done."""
        shutil.rmtree(self.folder, ignore_errors=True)

    @contextmanager
    def errors_say_what_is_kept(self) -> Iterator[None]:
        """Adds to an error that leaves this block what is kept, and how to go on.

        A journal is kept if the same command may end otherwise the next time: after an interrupt, or on a full disk.
        """
        try:
            yield
        except OptimumPruneError as error:
            if self._journal is not None and not isinstance(error, OutputError):
                self._remove_journal()
            if kept := self._kept():
                raise type(error)(f"{error} {kept}") from error
            raise
        except KeyboardInterrupt as error:
            if kept := self._kept():
                raise KeyboardInterrupt(kept) from error
            raise
        except OSError as error:
            if error.errno is not None and (kept := self._kept()):
                raise OSError(error.errno, f"{error.strerror}. {kept}") from error
            raise

    def _remove_journal(self) -> None:
        self._journal = None
        shutil.rmtree(self.folder / JOURNAL, ignore_errors=True)
        with suppress(OSError):  # a checkpoint of another run may be there
            self.folder.rmdir()

    def _kept(self) -> str:
        """What the same command can go on from, in a sentence."""
        if self._journal is not None:
            if len(self._journal):
                return f"What was done so far is kept in {self.folder}; the same command goes on from there."
            self._remove_journal()
        state = self._read() if self._saved else None
        if state is None:
            return ""
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

    def _begun(self) -> Any:
        """What the journal is of, if there is one."""
        try:
            begun = json.loads((self.folder / JOURNAL / BEGUN).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return begun if {"identity", "passes", "process"} <= begun.keys() else None

    def _check_owner(self, name: str, known: Mapping[str, Any] | None) -> None:
        """Raises an error if the process that wrote a file of this folder is still there, and not another by its number."""
        if known is None:
            return
        host, process = known["process"]
        if host != socket.gethostname() or process == os.getpid() or not runs(process):
            return
        if started_at(process) > (self.folder / name).stat().st_mtime + CLOCKS:
            return
        raise OutputError(f"The process {process} is at work on {self.folder}. Wait for it, or name another --output.")


def _write(file: Path, plain: Mapping[str, Any]) -> None:
    """Writes JSON, whole or not at all."""
    partial = file.with_name(f"{file.name}.partial")
    partial.write_text(json.dumps(plain, indent=2), encoding="utf-8")
    partial.replace(file)
