"""Standard input, output and error of a program: what it prints on purpose is apart from what libraries print, and nothing is asked."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from typing import IO, TextIO


class NotPrintedError(Exception):
    """What was to be printed cannot be: standard output is full, closed, or read by nobody any more."""

    @property
    def nobody_reads(self) -> bool:
        """Whether whoever read it has gone, as `| head` does: there is nobody to be told."""
        return isinstance(self.__cause__, BrokenPipeError)


def say(out: TextIO, text: str) -> None:
    """Prints a text, now.

    Raises:
        NotPrintedError: it cannot be printed.
    """
    try:
        print(text, file=out)
    except OSError as error:
        raise NotPrintedError(f"Standard output takes nothing: {error.strerror}.") from error
    flush(out)


def flush(out: TextIO) -> None:
    """Prints what is still to be printed.

    Raises:
        NotPrintedError: it cannot be printed.
    """
    try:
        out.flush()
    except OSError as error:
        raise NotPrintedError(f"Standard output takes nothing: {error.strerror}.") from error


def open_closed() -> None:
    """Opens those of the three that are closed, on nothing: the next file that is opened must not take their place."""
    for number, mode in ((0, os.O_RDONLY), (1, os.O_RDONLY), (2, os.O_WRONLY)):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, mode)  # what is written to 1 is an error, as it was before


@contextmanager
def for_results(*, asks: bool = False) -> Iterator[TextIO]:
    """Standard output for what the program has to say, for the time of a `with`.

    Whatever else is printed meanwhile, by libraries and by programs that they start, goes to standard error. Who asks on standard
    input gets no answer.

    Args:
        asks: whether standard input is left as it is, for a debugger.
    """
    open_closed()
    with ExitStack() as stack:
        if sys.stderr is None:
            stack.enter_context(redirect_stderr(stack.enter_context(Path(os.devnull).open("w", encoding="utf-8"))))
        out = stack.enter_context(_own_output())
        stack.enter_context(redirect_stdout(sys.stderr))
        if not asks:
            stack.callback(setattr, sys, "stdin", sys.stdin)
            sys.stdin = stack.enter_context(Path(os.devnull).open(encoding="utf-8"))
        yield out


@contextmanager
def _own_output() -> Iterator[TextIO]:
    """Standard output under another number, and its own number as that of standard error; or what stands in its place, as it is."""
    if sys.stdout is not None and _number(sys.stdout) != 1:
        yield sys.stdout
        return
    with suppress(OSError, ValueError, AttributeError):
        sys.stdout.flush()
    kept = os.dup(1)
    out = open(os.dup(1), "w", encoding=getattr(sys.stdout, "encoding", None), errors="backslashreplace")  # noqa: SIM115, PTH123
    os.dup2(2, 1)
    try:
        yield out
    finally:
        with suppress(OSError, ValueError):  # whoever printed has flushed, and knows
            out.close()
        os.dup2(kept, 1)
        os.close(kept)


def _number(stream: IO[str] | None) -> int | None:
    """The number under which the system knows a stream, if it does."""
    try:
        return None if stream is None else stream.fileno()
    except (OSError, ValueError):
        return None
