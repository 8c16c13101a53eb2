"""Files that are there whole or not at all, whenever the process that writes them ends."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole(file: Path) -> Iterator[Path]:
    """The name under which a file is to be written within a `with`, beside its own, which it gets at the end."""
    partial = file.with_name(f"{file.name}.partial")
    yield partial
    partial.replace(file)
