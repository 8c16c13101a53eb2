"""What is kept of a run: where, and the files that say of what, whole or as good as not there."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from optimum_prune.machine.whole_files import whole

LARGEST = 2**26
"""Bytes of such a file."""


def unfinished_folder(output: Path) -> Path:
    """Where what is unfinished of a run with this output is kept."""
    path = Path(os.path.abspath(output))
    return path.with_name(f"{path.name}.unfinished")


def known_in(file: Path, more: Mapping[str, type] | None = None) -> Any:
    """What a file says of a run that wrote it; None if none did, whatever it holds."""
    kinds = {"identity": dict, "passes": list, **(more or {})}
    try:
        if file.stat().st_size > LARGEST:
            return None
        plain = json.loads(file.read_text(encoding="utf-8"))
        steps = [(str(name), dict(options)) for name, options, _ in plain["passes"]]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):  # none, or something else's
        return None
    fits = steps is not None and all(isinstance(plain.get(name), kind) for name, kind in kinds.items())
    return plain if fits else None


def write_known(file: Path, plain: Mapping[str, Any]) -> None:
    """Writes JSON, whole or not at all."""
    with whole(file) as partial:
        partial.write_text(json.dumps(plain, indent=2), encoding="utf-8")


def as_kept(passes: Sequence[Sequence[Any]]) -> list[Any]:
    """Passes as they come back from a file."""
    plain: list[Any] = json.loads(json.dumps([list(step) for step in passes]))
    return plain
