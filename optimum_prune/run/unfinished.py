"""What is finished of a run that ended early: a folder beside its output, from which the same run can go on.

`OUT.unfinished` holds the last checkpoint that was whole, with the artefacts made from it so far, and `state.json`, which says what
it is: on what model and text, by which passes, and what the report needs to know of them. That file is written last and at once, so
that whatever it names is whole.

Before there is such a checkpoint, while passes change the model in memory, the folder holds the journal of that, with a `begun.json`
which says of what.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

from optimum_prune.errors import OptimumPruneError, OutputError, RecipeError, VetoError, followed, found_no_memory
from optimum_prune.machine import interrupts, processes
from optimum_prune.machine.processes import ProcessError
from optimum_prune.machine.watched_files import WEIGHTS
from optimum_prune.run.fingerprints import files_fingerprint
from optimum_prune.run.hidden import discard
from optimum_prune.run.journal import Journal
from optimum_prune.run.known import as_kept, known_in, unfinished_folder, write_known
from optimum_prune.run.ownership import check_unfinished
from optimum_prune.training.lesson import anything_kept

STATE = "state.json"
"""In the folder: what its checkpoint is."""
JOURNAL, BEGUN = "journal", "begun.json"
"""In the folder: that of the journal, and in this, what it is of."""
TRAINING = "training"
"""In the folder: a folder for each pass that trains, from which it goes on."""
CHECKPOINT = re.compile(r"\d+-[\w.-]+")
"""The names of checkpoints in the folder."""

REST = ", with the rest of the recipe mended,"
Passes = Sequence[tuple[str, Mapping[str, Any], str]]
"""Names and options of passes, and the fingerprints of their code."""


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
        self.output = Path(os.path.abspath(output))
        self.folder = unfinished_folder(output)
        self.identity = dict(identity)
        self._journal: Journal | None = None
        self._saved = False
        self.remark = ""
        """What is to be said of what was found here."""

    def find(self, passes: Passes, resume: bool) -> Finished | None:
        """What is finished of these passes, if there is a checkpoint; there may be a journal.

        Args:
            resume: whether to refuse what is of another run, instead of beginning anew.

        Raises:
            RecipeError: it is of another run, and is to be gone on with.
            OutputError: what is there is not ours.
        """
        check_unfinished(self.folder)
        before = self._left()
        state, begun = self._read(), self._begun()
        there = [known for known in (state, begun) if known is not None]
        fitting = [known for known in there if not self._changed(known, passes)]
        if begun is not None and self._shared(begun, passes):
            fitting.append(begun)
        if state in fitting:
            self._saved = True
            return Finished(self.folder / state["checkpoint"], len(state["passes"]), state["facts"])
        if resume and there and not fitting:
            changed = self._changed(there[-1], passes)
            raise RecipeError(
                f"{self.folder} is of another run: {', '.join(changed)} changed. Run with what it was begun with, or leave --resume out to "
                f"begin anew."
            )
        if before and begun not in fitting:
            other = ", ".join(self._changed(there[-1], passes)) + " changed" if there else ""
            self.disregard(other or "what is there cannot be used")
        return None

    def disregard(self, why: str) -> None:
        """Lets the run begin anew, although a checkpoint was found, and the reason be said."""
        self._saved = False
        self.remark = f"Beginning anew instead of going on from {self.folder}: {why}."

    def _left(self) -> bool:
        """Whether anything lies here."""
        return self.folder.is_dir() and any(self.folder.iterdir())

    def journal(self, passes: Passes) -> Journal | None:
        """The journal of these passes on the model in memory: what is here of those that it begins with, or an empty one in its place.

        Returns:
            None if nobody could go on from it, since nothing tells whether the model is the same.

        Raises:
            OutputError: what is there is not ours.
        """
        if None in self.identity.values():
            return None
        shared = processes.broadcast_from_first(lambda: self._made_ready(passes))
        first = self.folder / JOURNAL
        folder = first if processes.first() else first.with_name(f"{JOURNAL}-{processes.rank()}")
        folder.mkdir(parents=True, exist_ok=True)
        self._journal = Journal(folder, first)
        self._journal.forget_behind(shared)
        self._journal.align()
        if processes.first():
            write_known(folder / BEGUN, self._known(passes))
        return self._journal

    def _made_ready(self, passes: Passes) -> int:
        """Removes what is of no use for these passes.

        Returns:
            How many passes what is left may be of.
        """
        check_unfinished(self.folder)
        begun = self._begun()
        shared = 0 if begun is None else self._shared(begun, passes)
        if not shared:
            self._discard_journals()
        for each in (self.folder / TRAINING).glob("*"):
            if int(each.name.partition("-")[0]) >= shared:
                self._discard(each)
        return shared

    def _discard_journals(self) -> None:
        for folder in self.folder.glob(f"{JOURNAL}*"):
            self._discard(folder)

    def _known(self, passes: Passes) -> dict[str, Any]:
        """What tells whether another run may go on from here, and who is at work."""
        return {
            "identity": self.identity,
            "passes": [list(step) for step in passes],
            "process": [socket.gethostname(), os.getpid()],
        }

    def _changed(self, known: Mapping[str, Any], passes: Passes) -> list[str]:
        """What differs between what is here and what is asked for."""
        changed, there, wanted = self._differing(known), known["passes"], as_kept(passes)
        if there != wanted[: len(there)]:
            same = [step[:2] for step in there] == [step[:2] for step in wanted[: len(there)]]
            changed.append("the code of its passes" if same else "the options of its passes")
        return changed

    def _shared(self, begun: Mapping[str, Any], passes: Passes) -> int:
        """How many of these passes are the first of those that a journal is of, and as they were there."""
        if self._differing(begun):
            return 0
        pairs = zip(begun["passes"], as_kept(passes), strict=False)
        return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))

    def _differing(self, known: Mapping[str, Any]) -> list[str]:
        """What of the identity differs, beside the passes."""
        return [what for what, value in self.identity.items() if value is None or known["identity"].get(what) != value]

    def save(self, checkpoint: Path, passes: Passes, facts: Mapping[str, Any]) -> Path:
        """Moves a whole checkpoint here, unless it is here, and notes what it is.

        Returns:
            Where it is now.
        """
        self.folder.mkdir(exist_ok=True)
        place = checkpoint
        if checkpoint.parent != self.folder:
            place = self.folder / f"{len(passes)}-{checkpoint.name}"
            self._discard(place)
            checkpoint.rename(place)
        about = {"checkpoint": place.name, "files": files_fingerprint(place, WEIGHTS), "facts": facts}
        write_known(self.folder / STATE, {**self._known(passes), **about})
        self._journal, self._saved = None, True
        for entry in self.folder.iterdir():  # what the state no longer names
            if entry.is_dir() and entry != place:
                self._discard(entry)
        return place

    def forget(self) -> None:
        """Lets nothing be gone on from: what is kept was changed by somebody else."""
        self._journal, self._saved = None, False
        self.remove()

    def remove(self) -> None:
        """Removes the folder, when the run is done; what is not ours stays."""
        with suppress(OutputError):
            check_unfinished(self.folder)
            self._discard(self.folder)

    def _discard(self, folder: Path) -> None:
        discard(folder, self.output)

    @contextmanager
    def errors_say_what_is_kept(self) -> Iterator[None]:
        """Adds to an error that leaves this block what is kept, and how to go on.

        A journal is kept if the same command may end otherwise the next time: after an interrupt or a veto, on a full disk or without memory;
        and if passes are done in it before the one that failed, which may be mended.
        """
        try:
            with interrupts.telling(self._in_journal):
                yield
        except OptimumPruneError as error:
            again = _may_end_otherwise(error)
            if self._journal is not None and not again and not self._journal.stopped_behind_others:
                self._remove_journal()
            if kept := self._kept("" if again else REST):
                raise followed(error, kept) from error
            raise
        except KeyboardInterrupt as error:
            if kept := self._kept():
                raise KeyboardInterrupt(kept) from error
            raise
        except OSError as error:
            if error.errno is not None and (kept := self._kept()):
                raise OSError(error.errno, f"{error.strerror}. {kept}") from error
            raise

    def training(self) -> Path | None:
        """Where passes that train keep what they go on from; None if nobody could."""
        return None if self._journal is None else self.folder / TRAINING

    def _remove_journal(self) -> None:
        self._journal = None
        self._discard_journals()
        self._discard(self.folder / TRAINING)
        with suppress(OSError):  # a checkpoint of another run may be there
            self.folder.rmdir()

    def _in_journal(self, mended: str = "") -> str:
        """That there is something in the journal, or of a training, in a sentence."""
        trainings = (self.folder / TRAINING).glob("*")
        if self._journal is None or not (len(self._journal) or any(map(anything_kept, trainings))):
            return ""
        return f"What was done so far is kept in {self.folder}; the same command{mended} goes on from there."

    def _kept(self, mended: str = "") -> str:
        """What the same command can go on from, in a sentence; `mended` says what is to be mended before."""
        if kept := self._in_journal(mended):
            return kept
        if self._journal is not None:
            self._remove_journal()
        state = self._read() if self._saved else None
        if state is None:
            return ""
        done = ", ".join(name for name, *_ in state["passes"])
        return (
            f"The checkpoint after {done or 'loading'} is kept in {self.folder / state['checkpoint']}; the same command{REST} goes on from "
            f"there."
        )

    def _read(self) -> Any:
        """What the checkpoint here is of, if there is one."""
        state = known_in(self.folder / STATE, {"checkpoint": str, "files": str, "facts": dict})
        if state is None or not CHECKPOINT.fullmatch(state["checkpoint"]):
            return None
        checkpoint = self.folder / state["checkpoint"]
        try:
            whole = (checkpoint / "config.json").is_file() and files_fingerprint(checkpoint, WEIGHTS) == state["files"]
        except OSError:
            whole = False
        return state if whole and not checkpoint.is_symlink() else None

    def _begun(self) -> Any:
        """What the journal is of, if there is one."""
        return known_in(self.folder / JOURNAL / BEGUN)


def _may_end_otherwise(error: OptimumPruneError) -> bool:
    """Whether the same command may come to another end the next time, with nothing changed that a journal is of."""
    cause = error.__cause__
    return isinstance(error, (OutputError, VetoError, ProcessError)) or (cause is not None and found_no_memory(cause))
