"""Weights and activations that stay on disk: mapped into memory, read when they are used, and given back afterwards.

A mapped model is an ordinary model whose parameters lie in files. A page of a file takes memory from when it is first read until it is
given back, so giving back a layer's pages when it has run leaves one layer in memory at a time, whoever runs it. Meanwhile the
system is told to read the next layer's pages ahead. What a pass changes is written to a file of its own at once, and mapped from
there.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import struct
import weakref
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from optimum_prune.errors import CheckpointError
from optimum_prune.measure import give_back, return_large_blocks

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
ORDER = (
    torch.int64,
    torch.float64,
    torch.float32,
    torch.int32,
    torch.bfloat16,
    torch.float16,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
)
"""In which order safetensors lays out tensors: first those whose elements are larger."""
CHUNK = 2**24
"""How many bytes are written at a time."""


_STORES: weakref.WeakKeyDictionary[nn.Module, Store] = weakref.WeakKeyDictionary()
"""Of each layer that gives its memory back when it has run, where its weights are."""
_HELD: weakref.WeakSet[nn.Module] = weakref.WeakSet()


@contextmanager
def held(layer: nn.Module) -> Iterator[None]:
    """Keeps the weights of a layer in memory between several runs of it, for the time of a `with`."""
    _HELD.add(layer)
    try:
        yield
    finally:
        _HELD.discard(layer)
        if layer in _STORES:
            _STORES[layer].release(layer)


class Store:
    """Where the weights of a model are while it is not resident.

    Args:
        folder: for the weights that a pass changes.
    """

    def __init__(self, folder: Path) -> None:
        return_large_blocks()
        self._folder = folder
        self._files: list[Tensor] = []  # as bytes, by their addresses
        self._numbers = count()

    def map(self, file: Path) -> dict[str, Tensor]:
        """The tensors of a safetensors file, mapped.

        Raises:
            CheckpointError: it is no such file, or ends too early.
        """
        try:
            with file.open("rb") as opened:
                (length,) = struct.unpack("<Q", opened.read(8))
                header: dict[str, Any] = json.loads(opened.read(length))
            header.pop("__metadata__", None)
            size = file.stat().st_size
            if max((about["data_offsets"][1] for about in header.values()), default=0) > size - 8 - length:
                raise ValueError("it ends before its last tensor does")
            content = torch.from_file(str(file), shared=False, size=size, dtype=torch.uint8)
        except (OSError, ValueError, RuntimeError, struct.error, KeyError, TypeError) as error:
            raise CheckpointError(f"The weights file {file} is damaged: {error}. Fetch it again.") from error
        if not header:
            return {}
        self._files.append(content)
        self._files.sort(key=Tensor.data_ptr)
        memory = content.numpy().data
        return {name: _tensor(memory, 8 + length, about) for name, about in header.items()}

    def attach(self, model: nn.Module) -> None:
        """Lets a mapped model give back each decoder layer when it has run, and whatever lies outside of them, and read the next
        layer ahead.
        """
        lists = [list(module) for module in model.modules() if isinstance(module, nn.ModuleList)]
        inside = {id(module) for layers in lists for layer in layers for module in layer.modules()}
        for layers in lists:
            for layer, following in zip(layers, [*layers[1:], None], strict=True):
                layer.register_forward_pre_hook(lambda *_, following=following: self._read_ahead(following))
                layer.register_forward_hook(lambda module, *_: self._release_unless_held(module), always_call=True)
                _STORES[layer] = self
        for module in model.modules():
            if id(module) not in inside and any(True for _ in module.parameters(recurse=False)):
                module.register_forward_hook(lambda module, *_: self.release(module), always_call=True)

    def _read_ahead(self, module: nn.Module | None) -> None:
        for parameter in () if module is None else module.parameters():
            self._advise(parameter, mmap.MADV_WILLNEED)

    def _release_unless_held(self, layer: nn.Module) -> None:
        if layer not in _HELD:
            self.release(layer)

    def release(self, module: nn.Module) -> None:
        """Gives back the memory of a module's weights; they are read again when they are used again."""
        for parameter in module.parameters():
            self._advise(parameter, mmap.MADV_DONTNEED)

    def _advise(self, tensor: Tensor, advice: int) -> None:
        if self._holds(tensor):
            _advise(tensor, advice)

    def _holds(self, tensor: Tensor) -> bool:
        """Whether a tensor lies in one of the files."""
        position = bisect_right(self._files, tensor.data_ptr(), key=Tensor.data_ptr) - 1
        if position < 0 or tensor.numel() == 0:
            return False
        file = self._files[position]
        return tensor.data_ptr() < file.data_ptr() + len(file)

    def settle(self, model: nn.Module) -> None:
        """Writes the weights that lie in memory to a file and maps them from there; their values stay."""
        fresh: dict[int, nn.Parameter] = {}
        for parameter in model.parameters():
            if parameter.device.type == "cpu" and not self._holds(parameter):
                fresh[id(parameter)] = parameter
        if not fresh:
            return
        self._folder.mkdir(exist_ok=True)
        file = self._folder / f"{next(self._numbers)}.safetensors"
        write({str(number): parameter.detach() for number, parameter in enumerate(fresh.values())}, file)
        mapped = self.map(file)
        for number, parameter in enumerate(fresh.values()):
            parameter.data = mapped[str(number)]
        for each in self._files:  # what was read to be cut, too
            _advise(each, mmap.MADV_DONTNEED)
        give_back()

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Lets transformers save a model tensor by tensor, each given back when it is written."""
        from transformers import modeling_utils

        def save(tensors: Mapping[str, Tensor], file: Any, metadata: Mapping[str, str] | None = None) -> None:
            write(tensors, Path(file), metadata, written=lambda tensor: self._advise(tensor, mmap.MADV_DONTNEED))

        before = modeling_utils.safe_save_file
        modeling_utils.safe_save_file = save
        try:
            yield
        finally:
            modeling_utils.safe_save_file = before


class Shelf:
    """Where activations are kept for later: in memory up to a budget, beyond it in files that are mapped.

    Args:
        folder: for these files; each is gone with its tensor.
        budget: bytes to keep in memory.
    """

    def __init__(self, folder: Path, budget: int) -> None:
        self.budget = budget
        self._folder = folder
        self._held = 0
        self._addresses: set[int] = set()
        self._numbers = count()

    def keep(self, tensor: Tensor) -> Tensor:
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
        _advise(kept, mmap.MADV_DONTNEED)
        return kept

    def _let_go(self, size: int) -> None:
        self._held -= size

    def put_back(self, *tensors: Tensor) -> None:
        """Gives back the memory of those of the tensors that lie in files; they are read again when they are used again."""
        for tensor in tensors:
            if tensor.data_ptr() in self._addresses:
                _advise(tensor, mmap.MADV_DONTNEED)


def _allocate(file: Path, size: int) -> None:
    """Makes a file of so many bytes; on a full disk that fails here, and not with a signal when they are written."""
    with file.open("wb") as opened:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(opened.fileno(), 0, size)
        else:  # macOS, Windows
            opened.truncate(size)


def _advise(tensor: Tensor, advice: int) -> None:
    """Tells the system what will happen to the pages of a tensor that lies in a file."""
    begin = tensor.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
    _libc().madvise(ctypes.c_void_p(begin), ctypes.c_size_t(tensor.data_ptr() + tensor.nbytes - begin), advice)


@cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)


def _tensor(memory: memoryview, start: int, about: Mapping[str, Any]) -> Tensor:
    """A tensor in memory with a storage of its own: those that share one are taken to be tied."""
    dtype, (begin, end) = DTYPES[about["dtype"]], about["data_offsets"]
    if begin == end:
        return torch.empty(about["shape"], dtype=dtype)
    elements = torch.frombuffer(memory, dtype=dtype, count=(end - begin) // dtype.itemsize, offset=start + begin)
    return elements.view(about["shape"])


def write(
    tensors: Mapping[str, Tensor],
    file: Path,
    metadata: Mapping[str, str] | None = None,
    written: Callable[[Tensor], None] | None = None,
) -> None:
    """Writes a safetensors file a piece at a time, byte for byte as the library does.

    Args:
        written: called with each tensor when it is on disk.
    """
    names = sorted(tensors, key=lambda name: (ORDER.index(tensors[name].dtype), name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name in names:
        tensor = tensors[name]
        begin, end = end, end + tensor.nbytes
        header[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as opened:
        opened.write(struct.pack("<Q", len(text)) + text)
        for name in names:
            for piece in _pieces(tensors[name]):
                opened.write(piece)
            if written is not None:
                written(tensors[name])


def _pieces(tensor: Tensor) -> Iterator[memoryview]:
    elements = tensor.detach().contiguous().flatten()
    at_once = CHUNK // elements.element_size()
    for start in range(0, len(elements), at_once):
        yield elements[start : start + at_once].view(torch.uint8).cpu().numpy().data


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that hold a checkpoint's weights.

    Raises:
        CheckpointError: there are none, or one of the index is missing.
    """
    index = folder / "model.safetensors.index.json"
    single = folder / "model.safetensors"
    if index.is_file():
        names: Iterable[str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        files = [folder / name for name in sorted(set(names))]
        for file in files:
            if not file.is_file():
                raise CheckpointError(f"The checkpoint {folder} lacks the weights file {file.name}. Fetch it again.")
        return files
    if single.is_file():
        return [single]
    raise CheckpointError(
        f"{folder} has no safetensors file, and only those can be left on disk. Load it with transformers and save it anew, or leave "
        f"--offload out."
    )
