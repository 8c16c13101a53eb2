"""What becomes of a program that is told to stop: it says so and ends with the code 130, whenever that is.

While it imports its libraries there is nothing to clean up, and an exception might get lost in somebody's import: it ends at once. Later a
`KeyboardInterrupt` unwinds it, or, where something is to be kept first, waits until that is done. In the end, when what was asked for is there, it
is too late to stop.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
CODE = 130
GRACE = 3.0
"""Seconds for which further signals are taken for the same: a terminal and a launcher may both send one."""
LATER = 0.05
"""Seconds after which an interrupt that was swallowed is sent again."""

_program = ""
_first: float | None = None
"""When the first signal came that is being obeyed."""
_raises = _late = False
"""Whether a signal raises, and whether what it would stop is about to be there."""
_defers = _waits = False
"""Whether a first signal is to wait until a `deferred` ends, and whether one does."""
_kept: Callable[[], str] = str
"""What is kept, in a sentence; empty if nothing is."""
NOTHING = "nothing was written."
WAITING = "Stopping behind this step, whose state is kept; another Ctrl-C, some seconds later, stops at once."


def end_at_once(program: str) -> None:
    """Lets the program end as soon as it is told to stop, until `raised` has taken over and after that."""
    global _program
    _program = program
    for number in _heeded():
        signal.signal(number, _end)


@contextmanager
def raised() -> Iterator[None]:
    """Lets a signal to stop raise a KeyboardInterrupt within a `with`.

    After it, the signals are heeded as before; those of a program that had asked for `end_at_once`, not at all: it has come to its end.
    """
    global _first, _raises, _late
    _first, _raises, _late = None, True, False
    before = {number: signal.getsignal(number) for number in _heeded()}
    hook = sys.unraisablehook
    try:
        sys.unraisablehook = _unraisable
        for number in before:
            signal.signal(number, _raise)
        yield
    finally:
        _raises = False
        for number, handler in before.items():
            signal.signal(number, signal.SIG_IGN if handler is _end else handler)
        sys.unraisablehook = hook
        # Python ends itself by the signal, and not with a code, if the interrupt passed through an `exec` of a string, as in an import
        # of a dataclass, and no other string was executed after that.
        exec("")


@contextmanager
def finishing() -> Iterator[None]:
    """Lets no signal stop what runs within a `with`, nor, if that ends without an error, what comes after: it is too late by then."""
    global _late
    _late = True
    try:
        yield
    except BaseException:
        _late = False
        raise


@contextmanager
def deferred() -> Iterator[None]:
    """Lets a first signal raise at the end of a `with`, which looks whether one is `waiting` and makes haste; a later one raises at once."""
    global _defers, _waits
    _defers = True
    try:
        yield
    finally:
        waited, _defers, _waits = _waits, False, False
    if waited:
        raise KeyboardInterrupt


def waiting() -> bool:
    """Whether a signal to stop waits for the end of a `deferred`."""
    return _waits


@contextmanager
def telling(kept: Callable[[], str]) -> Iterator[None]:
    """Lets the program say what is kept if it is ended within a `with` because it did not come to an end by itself."""
    global _kept
    _kept = kept
    try:
        yield
    finally:
        _kept = str


def came() -> bool:
    """Whether a signal to stop has come within the `with`, whatever became of its KeyboardInterrupt."""
    return _first is not None


def stopping() -> bool:
    """Whether such a signal has come, and the `with` goes on: what goes wrong now does so because of it."""
    return _raises and came()


def _heeded() -> list[signal.Signals]:
    """The signals that are not ignored, as those of a program in the background may be; none in a thread, where nothing can be done."""
    if threading.current_thread() is not threading.main_thread():
        return []
    return [number for number in SIGNALS if signal.getsignal(number) not in (signal.SIG_IGN, None)]


def _end(number: int, frame: FrameType | None) -> None:  # noqa: ARG001 - every handler is called so
    if os.environ.get("RANK", "0") in ("", "0"):
        os.write(2, f"{_program}: interrupted; {_kept() or NOTHING}\n".encode(errors="replace"))
    os._exit(CODE)


def _raise(number: int, frame: FrameType | None) -> None:
    global _first, _waits
    if _late:
        return
    now = time.monotonic()
    if _first is None:
        _first, _waits = now, _defers
        if not _waits:
            raise KeyboardInterrupt
        if os.isatty(2):
            os.write(2, f"\n{WAITING}\n".encode())
    elif now - _first > GRACE:
        if not _waits:  # it does not come to an end
            _end(number, frame)
        _first, _waits = now, False
        raise KeyboardInterrupt


def _unraisable(unraisable: Any) -> None:
    """Sends an interrupt again that was lost where nothing can be raised, such as in a destructor."""
    global _first
    if not issubclass(unraisable.exc_type, KeyboardInterrupt):
        sys.__unraisablehook__(unraisable)
        return
    _first = None
    again = threading.Timer(LATER, signal.pthread_kill, (threading.main_thread().ident, signal.SIGINT))
    again.daemon = True
    again.start()
