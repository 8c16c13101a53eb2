"""Memory of this process: what it takes now and took at its peak, what is free, and giving back what is not needed any more."""

from __future__ import annotations

import ctypes
import gc
import mmap
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

M_MMAP_THRESHOLD = -3
"""As glibc's malloc.h numbers it."""
LARGE = 2**22
"""Bytes of a block of memory that is large."""


class Meter:
    """A `with` block that knows how many `seconds` it has taken so far and, afterwards, its `peak_memory` in bytes.

    The peak is the largest resident memory of the process within the block where the system can restart that count
    (Linux), else since the process began; plus what was allocated on an accelerator, if there is one.
    """

    def __init__(self) -> None:
        self.peak_memory = 0
        self._start = time.perf_counter()
        self._end: float | None = None

    @property
    def seconds(self) -> float:
        """Wall-clock seconds since the block began, or that it took."""
        return (time.perf_counter() if self._end is None else self._end) - self._start

    def __enter__(self) -> Meter:
        _restart_peak()
        self._start = time.perf_counter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end = time.perf_counter()
        self.peak_memory = _peak()


def give_back() -> None:
    """Gives memory that is free, but kept for what may come, back to the system, where that can be told to (Linux with glibc)."""
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


@contextmanager
def passing_over_what_is_there() -> Iterator[None]:
    """Lets `give_back` look within a `with` at what came since only: to look at all that libraries have imported takes it long, every time."""
    if gc.get_freeze_count():  # somebody else has seen to that
        yield
        return
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def return_large_blocks() -> None:
    """Lets memory of blocks beyond `LARGE` go back to the system as soon as it is free, for the rest of the process (Linux with glibc)."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").mallopt(M_MMAP_THRESHOLD, LARGE)


def _restart_peak() -> None:
    with suppress(OSError):  # not Linux, or not allowed: the count goes on from the start of the process
        Path("/proc/self/clear_refs").write_text("5")
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def resident() -> int:
    """Bytes of memory that this process takes now."""
    import psutil

    return int(psutil.Process().memory_info().rss)


def _peak() -> int:
    accelerator = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    try:
        status = Path("/proc/self/status").read_text()
        resident = next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        unit = 1 if sys.platform == "darwin" else 1024
        resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return resident + accelerator


def advise(tensor: Tensor, advice: int) -> None:
    """Tells the system what will happen to the pages of a tensor that lies in a file."""
    begin = tensor.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
    _libc().madvise(ctypes.c_void_p(begin), ctypes.c_size_t(tensor.data_ptr() + tensor.nbytes - begin), advice)


@cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)


def free_memory() -> int:
    """Bytes that a process can have now."""
    import psutil

    return int(psutil.virtual_memory().available)
