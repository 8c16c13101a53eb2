"""Keeps what transformers logs and warns of to itself, and what a process has set of torch from models: both, while models are made."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch


@contextmanager
def quietly() -> Iterator[None]:
    """Lets transformers log nothing and warnings go nowhere for the time of a `with`; and models are made `in_float32`.

    Its tables and notes are for who programs with it: we say what matters in a sentence.
    """
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    with warnings.catch_warnings(), in_float32():
        warnings.simplefilter("ignore")
        logging.set_verbosity(logging.CRITICAL)
        try:
            yield
        finally:
            logging.set_verbosity(verbosity)


@contextmanager
def in_float32() -> Iterator[None]:
    """Lets torch take float32 where no dtype is named, and the dtypes as they are, for the time of a `with`, whatever a process has set."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with ExitStack() as stack:
            for device in ("cpu", "cuda"):
                if torch.is_autocast_enabled(device):
                    stack.enter_context(torch.autocast(device, enabled=False))
            yield
    finally:
        torch.set_default_dtype(before)
