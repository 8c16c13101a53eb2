"""Safetensors files: which of a folder hold its weights, their tensors in mapped memory, and writing them a piece at a time."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from optimum_prune.errors import CheckpointError

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


def mapped_tensors(file: Path) -> tuple[Tensor, dict[str, Tensor]]:
    """The bytes of a safetensors file, mapped into memory, and its tensors, which lie there.

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
    memory = content.numpy().data
    return content, {name: _tensor(memory, 8 + length, about) for name, about in header.items()}


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
