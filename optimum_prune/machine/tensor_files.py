"""Safetensors files: which of a folder hold its weights, their tensors in mapped memory, and writing them a piece at a time."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise
from math import prod
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import torch
from torch import Tensor

from optimum_prune.errors import CheckpointError, cut, printable, reason

DTYPES = {
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
    "C64": torch.complex64,
    "F32": torch.float32,
    "U32": torch.uint32,
    "I32": torch.int32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""By their names in a file, in the order in which safetensors lays out tensors: first those whose elements are larger."""
NAMES = {dtype: name for name, dtype in DTYPES.items()}
ORDER = tuple(NAMES)
SPREAD = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors")
"""Names of files that several processes wrote together; no index lists them, and transformers reads them by itself."""
CHUNK = 2**24
"""How many bytes are written at a time."""
LONGEST = 200
"""Characters of the name of a file."""
SINGLE, PICKLE = "model.safetensors", "pytorch_model.bin"
INDICES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
"""Files of a checkpoint that hold all its weights, or say which do."""


Header = dict[str, tuple[torch.dtype, tuple[int, ...], int, int]]
"""Of each tensor in a file: dtype, shape, and from which byte of the file to which it lies."""


def header(file: Path) -> Header:
    """The tensors that a safetensors file says it has.

    Raises:
        CheckpointError: it is no such file, or what it says cannot be.
    """
    try:
        return _header(file)
    except (
        OSError,
        ValueError,
        RuntimeError,
        struct.error,
        KeyError,
        TypeError,
        AttributeError,
        RecursionError,
    ) as error:
        raise CheckpointError(
            f"The weights file {printable(str(file))} is damaged: {reason(error)} Fetch it again."
        ) from error


def _header(file: Path) -> Header:
    size = file.stat().st_size
    with file.open("rb") as opened:
        (length,) = struct.unpack("<Q", opened.read(8))
        if length > size - 8:
            raise ValueError("it ends before its header does")
        plain: dict[str, Any] = json.loads(opened.read(length))
    about_all = plain.pop("__metadata__", {})
    if not all(isinstance(text, str) for text in about_all.values()):
        raise ValueError("its metadata are no texts")
    found: Header = {}
    for name, about in plain.items():
        dtype, shape, (begin, end) = DTYPES.get(about["dtype"]), tuple(about["shape"]), about["data_offsets"]
        if dtype is None:
            raise ValueError(f"the dtype {about['dtype']} of '{name}' is unknown")
        if not all(isinstance(number, int) and number >= 0 for number in (*shape, begin, end)):
            raise ValueError(f"the sizes of '{name}' are no numbers")
        if end - begin != dtype.itemsize * prod(shape):
            raise ValueError(f"the shape of '{name}' does not fit its bytes")
        if end > size - 8 - length:
            raise ValueError("it ends before its last tensor does")
        found[name] = dtype, shape, 8 + length + begin, 8 + length + end
    places = sorted((begin, end) for _, _, begin, end in found.values())
    bounds = [(0, 8 + length), *places, (size, size)]
    if any(end != begin for (_, end), (begin, _) in pairwise(bounds)):
        raise ValueError("its tensors overlap, or there is something between or behind them")
    return found


def mapped_tensors(file: Path) -> tuple[Tensor, dict[str, Tensor]]:
    """The bytes of a safetensors file, mapped into memory, and its tensors, which lie there.

    Raises:
        CheckpointError: it is no such file, or ends too early.
    """
    found = header(file)
    try:
        content = torch.from_file(str(file), shared=False, size=file.stat().st_size, dtype=torch.uint8)
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"The weights file {printable(str(file))} cannot be read: {reason(error)}") from error
    memory = content.numpy().data
    return content, {name: _tensor(memory, *about) for name, about in found.items()}


def _tensor(memory: memoryview, dtype: torch.dtype, shape: tuple[int, ...], begin: int, end: int) -> Tensor:
    """A tensor in memory with a storage of its own: those that share one are taken to be tied."""
    if begin == end:
        return torch.empty(shape, dtype=dtype)
    elements = torch.frombuffer(memory, dtype=dtype, count=(end - begin) // dtype.itemsize, offset=begin)
    return elements.view(shape)


def write(
    tensors: Mapping[str, Tensor],
    file: Path,
    metadata: Mapping[str, str] | None = None,
    about_to_write: Callable[[Tensor], None] | None = None,
    written: Callable[[Tensor], None] | None = None,
) -> None:
    """Writes a safetensors file a piece at a time, byte for byte as the library does.

    Args:
        about_to_write: called with each tensor before it is read.
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
            if about_to_write is not None:
                about_to_write(tensors[name])
            for piece in _pieces(tensors[name]):
                opened.write(piece)
            if written is not None:
                written(tensors[name])


def _pieces(tensor: Tensor) -> Iterator[memoryview]:
    elements = tensor.detach().contiguous().flatten()
    at_once = CHUNK // elements.element_size()
    for start in range(0, len(elements), at_once):
        yield elements[start : start + at_once].view(torch.uint8).cpu().numpy().data


# Which files a folder's weights are in


def weight_files(folder: Path, named: str | None = None) -> list[Path]:
    """The safetensors files that hold a checkpoint's weights.

    Args:
        named: the file that the config names for them, if it does: one with weights, or an index.

    Raises:
        CheckpointError: there are none, or one of the index is missing.
    """
    found = files_of_weights(folder, named)
    if not found:
        raise without_weights(folder, named)
    if not any(file.suffix == ".bin" for file in found):
        return found
    raise CheckpointError(
        f"{printable(str(folder))} has no safetensors file (its weights are in {found[0].name}), and only those can be left on disk. Load it "
        f"with transformers and save it anew, or leave --offload out."
    )


def without_weights(folder: Path, named: str | None = None) -> CheckpointError:
    """The error that a folder has no weights, with what helps against it, as far as the folder shows.

    Args:
        named: the file that the config names for them, if it does.
    """
    where = f"The folder {printable(str(folder))}"
    if named:
        return CheckpointError(
            f"{where} has no file {printable(cut(named, LONGEST))}, which its config names for the weights. Fetch it, or mend its config.json."
        )
    entries = sorted(entry.name for entry in folder.iterdir())
    if spread := next(filter(SPREAD.fullmatch, entries), None):
        return CheckpointError(
            f"The weights of {printable(str(folder))} are spread over files that several processes wrote, such as {printable(spread)}, and cannot "
            f"be left on disk. Load it with transformers and save it anew, or leave --offload out."
        )
    packed = next((name for name in entries if name.endswith(".gguf")), None)
    remedy = "Fetch them, or name another folder." if packed is None else f"Name its file {printable(packed)} instead."
    return CheckpointError(f"{where} has no weights: neither {SINGLE} nor {PICKLE}, nor an index of such. {remedy}")


def files_of_weights(folder: Path, named: str | None = None) -> list[Path]:
    """The files that hold a checkpoint's weights, of several the same that transformers reads; none if there are none.

    Args:
        named: the file that the config names for them, if it does.

    Raises:
        CheckpointError: one of an index is missing.
    """
    for file in (folder / name for name in ([named] if named else [SINGLE, INDICES[0], PICKLE, INDICES[1]])):
        if file.is_file():
            return listed(file) if file.suffix == ".json" else [file]
    return []


def listed(index: Path, *, all_there: bool = True) -> list[Path]:
    """The files that an index names.

    Args:
        all_there: whether it is an error if one is missing.

    Raises:
        CheckpointError: it is no index, or names a file that is missing or is not in its folder.
    """
    where = f"The index of the weights {printable(str(index))}"
    try:
        plain = json.loads(index.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{where} cannot be read: {reason(error)} Fetch it again.") from error
    found = plain.get("weight_map") if isinstance(plain, dict) else None
    if not isinstance(found, dict) or not found or not all(isinstance(name, str) for name in found.values()):
        raise CheckpointError(f"{where} has no 'weight_map' that says in which file each weight is. Fetch it again.")
    names = sorted(set(found.values()))
    for name in names:
        if not is_plain(name) or len(name) > LONGEST:
            raise CheckpointError(
                f"{where} names '{cut(printable(name), LONGEST)}', which is no file of its folder, and nothing outside is read. Fetch it again."
            )
        if all_there and not (index.parent / name).is_file():
            raise CheckpointError(
                f"The checkpoint {printable(str(index.parent))} lacks the weights file {printable(name)}. Fetch it again."
            )
    return [index.parent / name for name in names]


def is_plain(name: str) -> bool:
    """Whether a name is that of a file in its folder or below, and leads nowhere else."""
    windows, posix = PureWindowsPath(name), PurePosixPath(name)
    outside = windows.is_absolute() or windows.drive or posix.is_absolute() or ".." in windows.parts
    return bool(posix.name) and not outside and "\0" not in name
