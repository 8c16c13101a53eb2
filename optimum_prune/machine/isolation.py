"""Keeps libraries and plugins from changing the process that they run in: what they print, log, warn of, set and draw ends with a `with`."""

from __future__ import annotations

import errno
import importlib
import io
import logging
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path
from traceback import walk_tb
from typing import Any, TypeVar

import torch

from optimum_prune.errors import OptimumPruneError, PassError, found_no_memory, printable, reason
from optimum_prune.machine import interrupts

T = TypeVar("T")
REMEDY = "Please report it to whoever wrote it."
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
"""Numbers of the system's errors that are of the disk, and not of whoever writes on it."""
OURS = ("optimum_prune", "contextlib")
"""Packages in which a traceback begins that leads to somebody else's code."""
SETTINGS: tuple[tuple[Callable[[], Any], Callable[[Any], Any]], ...] = (
    (torch.get_default_dtype, torch.set_default_dtype),
    (torch.is_grad_enabled, torch.set_grad_enabled),
    (torch.get_num_threads, torch.set_num_threads),
    (torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms),
)
"""How what torch computes by for the whole process is read, and set."""
NO_DEVICE = "cpu" if torch.__version__.startswith("2.9.") else None
"""What puts torch's default device back to the CPU: of a device that is none, torch 2.9 cannot tell any more which it is, and fails."""


@contextmanager
def isolated(*imports: str, seed: int | None = None, silent: bool = False) -> Iterator[None]:
    """Puts back what libraries change within a `with`, and lets what they print go nowhere.

    Put back are the environment's variables, the level and the handlers of the root logger, and the filters of warnings.

    Args:
        imports: modules to import first. The level that this gives the root logger does not even hold within the block.
        seed: of torch's random numbers within the block; after it they go on as if it had not been. Without one, nothing is done
            about them.
        silent: whether warnings, and what is logged up to that level, go nowhere too.
    """
    with ExitStack() as stack:
        stack.enter_context(environment_kept())
        stack.enter_context(_root_logger())
        stack.enter_context(warnings.catch_warnings())
        stack.enter_context(redirect_stdout(io.StringIO()))
        if silent:
            stack.enter_context(_silence())
        if seed is not None:
            stack.enter_context(torch.random.fork_rng())
            torch.manual_seed(seed)
        level = logging.root.level
        for module in imports:
            importlib.import_module(module)
        logging.root.setLevel(level)
        yield


@contextmanager
def guarded(name: str, remedy: str = REMEDY, kind: type[OptimumPruneError] = PassError) -> Iterator[None]:
    """Lets the code of a pass run within a `with`, and puts back what it changes of the process.

    Put back are torch's default dtype and device, whether gradients are computed, how many threads compute and whether they do so alike
    each time, the handlers of signals, the current folder, the environment's variables, standard input and error, the root logger and the
    filters of warnings. What it prints goes to stderr.

    Args:
        name: what the code is called, such as "The pass 'depth'".
        remedy: what to do about an error of it.
        kind: of the error that is raised instead.

    Raises:
        PassError: the code raises an error that is none of ours, or asks the program to end. An interrupt, whatever the code made of
            it, and that the disk is full, are nobody's error and stay what they are.
    """
    with _kept(_State.now()), _errors_named(name, remedy, kind):
        yield


def guarded_steps(name: str, make: Callable[[], Iterable[T]], remedy: str = REMEDY) -> Iterator[T]:
    """What the code of a pass yields, each made as within `guarded`; between two, the process is as before.

    When it goes on, it finds what it had set, such as that no gradients are computed.

    Args:
        make: begins; it may compute all at once.
    """
    nothing: Any = object()
    outer = _State.now()
    with _kept(outer), _errors_named(name, remedy):
        steps = iter(make())
        inner = _State.now()
    while True:
        outer = _State.now()
        with _kept(outer), _errors_named(name, remedy):
            inner.put_back()
            step = next(steps, nothing)
            inner = _State.now()
        if step is nothing:
            return
        yield step


@contextmanager
def _kept(before: _State) -> Iterator[None]:
    with ExitStack() as stack:
        stack.callback(before.put_back)
        stack.enter_context(_root_logger())
        stack.enter_context(warnings.catch_warnings())
        stack.callback(setattr, sys, "stdin", sys.stdin)
        stack.enter_context(redirect_stderr(sys.stderr))
        stack.enter_context(redirect_stdout(sys.stderr))
        yield


@contextmanager
def _errors_named(name: str, remedy: str, kind: type[OptimumPruneError] = PassError) -> Iterator[None]:
    try:
        yield
        if interrupts.stopping():  # the code did not let it pass
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        if interrupts.stopping():
            raise KeyboardInterrupt from error
        if isinstance(error, OptimumPruneError) or (isinstance(error, OSError) and error.errno in FULL):
            raise
        raise kind(f"{name} {_what_went_wrong(error, remedy)}".strip()) from error


def _what_went_wrong(error: BaseException, remedy: str) -> str:
    """What is to be said of an error behind the name of whose it is."""
    if isinstance(error, SystemExit):
        return f"asked the program to end, by sys.exit({error.code!r}). {remedy}"
    if found_no_memory(error):
        return "found no memory left. Leave the weights on disk with --offload, or ask for fewer or shorter windows."
    return f"failed: {type(error).__name__}: {reason(error)} {_where(error)}{remedy}"


def _where(error: BaseException) -> str:
    """The last line of somebody else's code that an error passed, before it came from a library that this calls."""
    passed = [
        (str(frame.f_globals.get("__name__", "")).partition(".")[0], frame, line)
        for frame, line in walk_tb(error.__traceback__)
    ]
    while passed and passed[0][0] in OURS:
        passed.pop(0)
    lines = [
        f"{printable(Path(frame.f_code.co_filename).name)}, line {line}"
        for top, frame, line in passed
        if top == passed[0][0]
    ]
    return f"It was in {lines[-1]}. " if lines else ""


@dataclass(frozen=True)
class _State:
    """What code can set for the whole process."""

    settings: tuple[Any, ...]
    """Of torch."""
    device: torch.device
    folder: str | None
    signals: dict[int, Any]
    environment: dict[str, str]

    @classmethod
    def now(cls) -> _State:
        """As it is."""
        folder = None
        with suppress(OSError):  # it may have been removed
            folder = os.getcwd()  # noqa: PTH109 - to go back there
        return cls(
            tuple(read() for read, _ in SETTINGS),
            torch.get_default_device(),
            folder,
            {number: signal.getsignal(number) for number in signal.valid_signals()},
            dict(os.environ),
        )

    def put_back(self) -> None:
        """As it was, where it was changed."""
        for (read, change), before in zip(SETTINGS, self.settings, strict=True):
            if read() != before:
                change(before)
        if torch.get_default_device() != self.device:
            torch.set_default_device(NO_DEVICE if self.device.type == "cpu" else self.device)
        if self.folder is not None:
            with suppress(OSError):
                os.chdir(self.folder)
        _put_back(self.environment)
        if threading.current_thread() is not threading.main_thread():
            return
        for number, handler in self.signals.items():
            if handler is not None and signal.getsignal(number) != handler:
                signal.signal(number, handler)


@contextmanager
def environment_kept() -> Iterator[None]:
    """Puts back what is changed of the environment's variables within a `with`."""
    before = dict(os.environ)
    try:
        yield
    finally:
        _put_back(before)


def _put_back(environment: Mapping[str, str]) -> None:
    if os.environ != environment:
        for name in set(os.environ) - set(environment):
            del os.environ[name]
        os.environ.update(environment)


@contextmanager
def _root_logger() -> Iterator[None]:
    level, handlers = logging.root.level, list(logging.root.handlers)
    try:
        yield
    finally:
        logging.root.setLevel(level)
        logging.root.handlers[:] = handlers


@contextmanager
def _silence() -> Iterator[None]:
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    try:
        yield
    finally:
        logging.disable(before)
