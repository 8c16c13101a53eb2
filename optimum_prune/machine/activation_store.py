"""Where activations are kept for later: in memory, or beyond a budget in files that are mapped."""

from __future__ import annotations

import mmap
import os
import weakref
from abc import ABC, abstractmethod
from itertools import count
from pathlib import Path

import torch
from torch import Tensor

from optimum_prune.machine.memory import advise


class ActivationStore(ABC):
    """Where activations, and what is summed over them, are kept until they are used again."""

    budget: float | None = None
    """Bytes that may be in memory; None if nobody said."""

    @abstractmethod
    def store(self, tensor: Tensor) -> Tensor:
        """The same values, wherever they are kept from now on."""

    @abstractmethod
    def release(self, *tensors: Tensor) -> None:
        """Gives back the memory of those of the tensors that lie in files; they are read again when they are used again."""


class InMemory(ActivationStore):
    """Keeps everything where it is."""

    def store(self, tensor: Tensor) -> Tensor:
        """The tensor itself."""
        return tensor

    def release(self, *tensors: Tensor) -> None:
        """Nothing lies in files."""


class MappedActivations(ActivationStore):
    """Keeps in memory up to a budget, and what is beyond it in files that are mapped.

    Args:
        folder: for these files; each is gone with its tensor.
        budget: bytes to keep in memory.
    """

    def __init__(self, folder: Path, budget: int) -> None:
        self.budget: int = budget
        self._folder = folder
        self._held = 0
        self._addresses: set[int] = set()
        self._numbers = count()

    def store(self, tensor: Tensor) -> Tensor:
        """The same values, in memory or in a file. What lies on an accelerator stays there."""
        if tensor.device.type != "cpu" or tensor.numel() == 0:
            return tensor
        if self._held + tensor.nbytes <= self.budget:
            self._held += tensor.nbytes
            weakref.finalize(tensor, self._let_go, tensor.nbytes)
            return tensor
        self._folder.mkdir(exist_ok=True)
        file = self._folder / str(next(self._numbers))
        try:
            _allocate(file, tensor.nbytes)
            kept = torch.from_file(str(file), shared=True, size=tensor.numel(), dtype=tensor.dtype).view(tensor.shape)
        finally:
            file.unlink(missing_ok=True)  # it lives as long as the memory that it is mapped to
        kept.copy_(tensor)
        self._addresses.add(kept.data_ptr())
        weakref.finalize(kept, self._addresses.discard, kept.data_ptr())
        advise(kept, mmap.MADV_DONTNEED)
        return kept

    def _let_go(self, size: int) -> None:
        self._held -= size

    def release(self, *tensors: Tensor) -> None:
        """Gives back the memory of those of the tensors that lie in files."""
        for tensor in tensors:
            if tensor.data_ptr() in self._addresses:
                advise(tensor, mmap.MADV_DONTNEED)


def _allocate(file: Path, size: int) -> None:
    """Makes a file of so many bytes; on a full disk that fails here, and not with a signal when they are written."""
    with file.open("wb") as opened:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(opened.fileno(), 0, size)
        else:  # macOS, Windows
            opened.truncate(size)
