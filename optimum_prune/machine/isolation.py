"""Keeps libraries from changing the process that they run in: what they print, log, warn of, set and draw ends with a `with`."""

from __future__ import annotations

import importlib
import io
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout

import torch


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
        stack.enter_context(_environment())
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
def _environment() -> Iterator[None]:
    before = dict(os.environ)
    try:
        yield
    finally:
        for name in set(os.environ) - set(before):
            del os.environ[name]
        os.environ.update(before)


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
