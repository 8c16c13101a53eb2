"""Weights of a model that stay on disk: mapped into memory, read when they are used, and given back afterwards.

A mapped model is an ordinary model whose parameters lie in files. A page of a file takes memory from when it is first read until it is
given back, so giving back a layer's pages when it has run leaves one layer in memory at a time, whoever runs it. Meanwhile the
system is told to read the next layer's pages ahead. What a pass changes is written to a file of its own at once, and mapped from
there.
"""

from __future__ import annotations

import mmap
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from optimum_prune.machine.memory import advise, give_back, return_large_blocks
from optimum_prune.machine.tensor_files import mapped_tensors, write
from optimum_prune.machine.watched_files import WatchedFile

ATTRIBUTE = "mapped_weights"
"""Under which a layer that gives its memory back when it has run knows the `MappedWeights` that its weights belong to."""


@contextmanager
def held(layer: nn.Module) -> Iterator[None]:
    """Keeps the weights of a layer in memory between several runs of it, for the time of a `with`; nothing if they are not mapped."""
    weights: MappedWeights | None = getattr(layer, ATTRIBUTE, None)
    if weights is None:
        yield
        return
    with weights.holding(layer):
        yield


def lies_on_disk(layer: nn.Module) -> bool:
    """Whether the weights of a layer are read from files whenever it runs."""
    return getattr(layer, ATTRIBUTE, None) is not None


def write_changes_of(model: nn.Module, layer: nn.Module) -> None:
    """Writes the weights of a copy of a model that lie in memory to files, if those of the model do, of which this is a layer."""
    weights: MappedWeights | None = getattr(layer, ATTRIBUTE, None)
    if weights is not None:
        weights.write_changes(model)


class _File(NamedTuple):
    """A file that is mapped."""

    content: Tensor
    """As bytes."""
    watched: WatchedFile

    @property
    def address(self) -> int:
        """Where it is mapped."""
        return self.content.data_ptr()


class MappedWeights:
    """The weights of a model that are mapped from files, and these files.

    Args:
        folder: for the weights that a pass changes.
    """

    def __init__(self, folder: Path) -> None:
        return_large_blocks()
        self._folder = folder
        self._files: list[_File] = []  # by their addresses
        self._numbers = count()
        self._held: set[nn.Module] = set()

    def __deepcopy__(self, _: dict[int, Any]) -> MappedWeights:
        """Itself: the copy of a layer has its weights in the same files."""
        return self

    def map(self, file: Path) -> dict[str, Tensor]:
        """The tensors of a safetensors file, mapped.

        Raises:
            CheckpointError: it is no such file, or ends too early.
        """
        content, tensors = mapped_tensors(file)
        if tensors:
            self._files.append(_File(content, WatchedFile.of(file)))
            self._files.sort(key=lambda each: each.address)
        return tensors

    def check(self, tensors: Iterable[Tensor]) -> None:
        """Refuses to read tensors in files that somebody has changed.

        Raises:
            CheckpointError: naming the first.
        """
        found = {file.address: file for file in map(self._file_of, tensors) if file is not None}
        for file in found.values():
            file.watched.check()

    def attach(self, model: nn.Module) -> None:
        """Lets a mapped model give back each layer when it has run, and whatever lies outside of layers, and read the next layer ahead.

        Before either is read, it is looked whether its files are as they were. Layers are what its lists of modules hold.
        """
        lists = [list(module) for module in model.modules() if isinstance(module, nn.ModuleList)]
        inside = {id(module) for layers in lists for layer in layers for module in layer.modules()}
        for layers in lists:
            for layer, following in zip(layers, [*layers[1:], None], strict=True):
                layer.register_forward_pre_hook(
                    lambda module, _, following=following: self._prepare(module, following)
                )
                layer.register_forward_hook(lambda module, *_: self._release_unless_held(module), always_call=True)
                setattr(layer, ATTRIBUTE, self)
        for module in model.modules():
            if id(module) not in inside and any(True for _ in module.parameters(recurse=False)):
                module.register_forward_pre_hook(lambda module, _: self.check(module.parameters(recurse=False)))
                module.register_forward_hook(lambda module, *_: self.release(module), always_call=True)

    def _prepare(self, layer: nn.Module, following: nn.Module | None) -> None:
        self.check(layer.parameters())
        for parameter in () if following is None else following.parameters():
            self._advise(parameter, mmap.MADV_WILLNEED)

    def _release_unless_held(self, layer: nn.Module) -> None:
        if layer not in self._held:
            self.release(layer)

    @contextmanager
    def holding(self, layer: nn.Module) -> Iterator[None]:
        """Keeps the weights of a layer in memory when it has run, until the end of a `with`."""
        self._held.add(layer)
        try:
            yield
        finally:
            self._held.discard(layer)
            self.release(layer)

    def release(self, module: nn.Module) -> None:
        """Gives back the memory of a module's weights; they are read again when they are used again."""
        for parameter in module.parameters():
            self.let_go(parameter)

    def let_go(self, tensor: Tensor) -> None:
        """Gives back the memory of one of the weights, and whatever was written there and not to its file."""
        self._advise(tensor, mmap.MADV_DONTNEED)

    def _advise(self, tensor: Tensor, advice: int) -> None:
        if self._holds(tensor):
            advise(tensor, advice)

    def _holds(self, tensor: Tensor) -> bool:
        """Whether a tensor lies in one of the files."""
        return self._file_of(tensor) is not None

    def _file_of(self, tensor: Tensor) -> _File | None:
        """The file in which a tensor lies, if it does."""
        position = bisect_right(self._files, tensor.data_ptr(), key=lambda each: each.address) - 1
        if position < 0 or tensor.numel() == 0:
            return None
        file = self._files[position]
        return file if tensor.data_ptr() < file.address + len(file.content) else None

    def lies_in_memory(self, tensor: Tensor) -> bool:
        """Whether a tensor lies in the host's memory, and in none of the files."""
        return tensor.device.type == "cpu" and not self._holds(tensor)

    def write_changes(self, model: nn.Module, written: Callable[[Tensor], None] | None = None) -> None:
        """Writes the weights of a model that lie in memory to a file and maps them from there; their values stay.

        Args:
            written: called with each when it is on disk.
        """
        fresh = {id(each): each for each in model.parameters() if self.lies_in_memory(each)}
        if fresh:
            self.move(list(fresh.values()), written)
            give_back()

    def move(self, parameters: Sequence[nn.Parameter], written: Callable[[Tensor], None] | None = None) -> None:
        """Writes parameters to a file and maps them from there; gives back the memory of all files, as of what they were made from."""
        for parameter, kept in zip(parameters, self.keep(parameters, written), strict=True):
            parameter.data = kept
        for file in self._files:
            advise(file.content, mmap.MADV_DONTNEED)

    def keep(self, tensors: Sequence[Tensor], written: Callable[[Tensor], None] | None = None) -> list[Tensor]:
        """Tensors with the values of these, written to a file and mapped from there."""
        self._folder.mkdir(exist_ok=True)
        file = self._folder / f"{next(self._numbers)}.safetensors"
        write({str(number): tensor.detach() for number, tensor in enumerate(tensors)}, file, written=written)
        mapped = self.map(file)
        return [mapped[str(number)] for number in range(len(tensors))]
