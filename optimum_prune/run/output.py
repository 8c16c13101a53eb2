"""Output folders: whole, or not there. A run writes into a hidden folder beside the output, which takes its place at the end."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from optimum_prune.errors import OutputError, cut, printable
from optimum_prune.machine import interrupts, processes
from optimum_prune.machine.locks import lock
from optimum_prune.run.hidden import left_hidden, make_hidden, remove_hidden
from optimum_prune.run.ownership import check_replaceable

CANNOT_WRITE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENAMETOOLONG)
"""Numbers of the system's errors that another output would spare."""
NOT_IN_NAMES = {
    "holds a NUL character, which no file can have": "\0",
    "breaks the line": "[\n\r\v\f\x1c-\x1e\x85\u2028\u2029]",
    "is no UTF-8": "[\ud800-\udfff]",
}
"""What is wrong with the name of an output that has one of these characters."""
LONGEST_SHOWN = 300
"""Characters of a name."""


def _nothing() -> None:
    """For when nothing is to be done."""


@dataclass
class HiddenOutput:
    """The hidden folder beside an output into which a run writes until it is done."""

    folder: Path
    """For whatever the run writes; gone at its end."""
    result: Path
    """What becomes the output; a pass that writes another checkpoint puts that in its place."""
    left: tuple[str, ...] = ()
    """Names of folders that runs on other hosts, which were killed, had left beside the output; they are removed, or put back."""
    when_done: Callable[[], None] = _nothing
    """Called when the result is in its place, before another run can be at work there."""


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
            held = stack.enter_context(_alone_at(output))
            left = _mend_abandoned(output)
            check_output(output, overwrite, inputs)
            folder = make_hidden(output, "partial")
            stack.callback(remove_hidden, folder)
            (folder / "model").mkdir()
            hidden = processes.broadcast_from_first(lambda: HiddenOutput(folder, folder / "model", left))
            yield hidden
            processes.wait()  # others may still read the result
            _finish(hidden, output, held, lambda: check_output(output, overwrite, inputs))
    except OSError as error:
        if _is_of_output(error, output):
            raise OutputError(
                f"The output {output} cannot be written: {error.strerror}. Name an --output elsewhere."
            ) from error
        raise


def _is_of_output(error: OSError, output: Path) -> bool:
    """Whether an error of the system means that an output cannot be written, and not that something else cannot be."""
    named = str(error.filename or "")
    return error.errno in CANNOT_WRITE and (
        not named or named.startswith((str(output), str(output.with_name(f".{output.name}."))))
    )


def _alone_at(output: Path) -> AbstractContextManager[Callable[[], bool]]:
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
    check_name(output)
    output = Path(os.path.abspath(output))
    if not os.path.lexists(output):
        return
    if not overwrite:
        raise OutputError(
            f"The output {output} exists already. Name another --output, or replace it with --overwrite."
        )
    check_replaceable(output, inputs)


def check_name(output: Path) -> None:
    """Refuses a name that no folder can have, or that a report and a terminal could not show.

    Raises:
        OutputError: it has a character that is none, or that breaks a line.
    """
    name = str(output)
    if wrong := next((why for why, found in NOT_IN_NAMES.items() if re.search(found, name)), ""):
        raise OutputError(
            f"The output {printable(cut(name, LONGEST_SHOWN))} cannot be written: its name {wrong}. Name another --output."
        )


def _finish(hidden: HiddenOutput, output: Path, held: Callable[[], bool], check: Callable[[], None]) -> None:
    """Moves the result into place; where something has appeared meanwhile that must not be replaced, beside it.

    Args:
        held: whether no other run has begun to work at the output.
        check: refuses what must not be replaced.
    """
    with interrupts.finishing():
        try:
            if not held():
                raise OutputError(f"The output {output} was taken by another run meanwhile.")
            check()
            _move_into_place(hidden.result, output)
        except (OutputError, OSError) as error:
            system = f"The output {output} cannot be written: {getattr(error, 'strerror', '')}."
            why, beside = error if isinstance(error, OutputError) else system, move_beside(hidden.result, output)
            if held():
                hidden.when_done()
            raise OutputError(f"{why} What was made is whole, and lies in {beside}.") from error
        hidden.when_done()


def move_beside(result: Path, output: Path) -> Path:
    """Moves what is finished, and cannot become the output, beside it; returns where it is."""
    output = Path(os.path.abspath(output))
    beside = next(place for number in count(1) if not os.path.lexists(place := _beside(output, number)))
    result.rename(beside)
    return beside


def _beside(output: Path, number: int) -> Path:
    return output.with_name(f"{output.name}.finished{'' if number == 1 else f'-{number}'}")


def _mend_abandoned(output: Path) -> tuple[str, ...]:
    """Removes what runs that are no more left beside the output, and puts back what they had replaced.

    Returns:
        What was of another host: there, nobody may know that the run ended.
    """
    found = []
    for kind in ("replaced", "partial"):
        for folder, here in left_hidden(output, kind):
            if kind == "replaced" and not os.path.lexists(output) and (folder / output.name).is_dir():
                (folder / output.name).rename(output)
            remove_hidden(folder)
            if not here:
                found.append(folder.name)
    return tuple(found)


def mend(output: Path, further: Callable[[], object] = _nothing) -> None:
    """Removes what killed runs left beside an output that is not to be written, as `hidden_output` does; nothing if another run is at work.

    Args:
        further: is called then, as long as no run can begin.
    """
    output = Path(os.path.abspath(output))
    with suppress(OSError, OutputError):
        if any(entry.name.startswith(f".{output.name}.") for entry in output.parent.iterdir()):
            with _alone_at(output):
                _mend_abandoned(output)
                further()


def _move_into_place(result: Path, output: Path) -> None:
    """Renames the result to the output. What it replaces is removed only when the result is there."""
    if not os.path.lexists(output):
        result.rename(output)
        return
    aside = make_hidden(output, "replaced")
    output.rename(aside / output.name)
    try:
        result.rename(output)
    except BaseException:
        (aside / output.name).rename(output)
        remove_hidden(aside)
        raise
    remove_hidden(aside)
