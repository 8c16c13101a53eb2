"""What a search has found out about a model, kept in a folder, so that one for another size begins there."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from optimum_prune.calibration.calibration import Once
from optimum_prune.errors import OutputError, RecipeError, reason
from optimum_prune.machine import given_files, processes
from optimum_prune.machine.versions import installed_versions
from optimum_prune.machine.whole_files import whole

if TYPE_CHECKING:
    from torch import nn

    from optimum_prune.calibration.calibration import Calibration

T = TypeVar("T")
SAMPLED = 256
"""Values of each parameter by which models are told apart."""
DIGITS = 16
"""Of a digest, in a folder's name."""


@dataclass(frozen=True)
class Library:
    """A folder of JSON files, each of which is made once; and behind it, the journal of the run."""

    folder: Path
    journal: Once

    def once(self, what: str, compute: Callable[[], T]) -> T:
        """What `compute` returns, which is plain data, or what was kept under this name."""
        return self.journal.once(what, lambda: self._kept(what, compute))

    def _kept(self, what: str, compute: Callable[[], T]) -> T:
        file = self.folder / f"{what}.json"
        found: list[T] = processes.broadcast_from_first(lambda: _read(file))
        if found:
            return found[0]
        value = compute()
        if processes.first():
            self._write(file, value)
        return value

    def _write(self, file: Path, value: object) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with whole(file) as partial:
                partial.write_text(json.dumps({"value": value, "digest": _digest(value)}), encoding="utf-8")
        except OSError as error:
            raise OutputError(
                f"The library {self.folder.parent} cannot be written: {reason(error)} Name another folder, or none."
            ) from error


def _read(file: Path) -> list[Any]:
    """What a file holds; nothing if it is not there, or not as it was written."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        return [found["value"]] if found["digest"] == _digest(found["value"]) else []
    except (OSError, ValueError, RecursionError, KeyError, TypeError):
        return []


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def check_library(step: str, name: str) -> None:
    """Refuses what cannot be a folder.

    Args:
        step: the pass that asks.

    Raises:
        RecipeError: something else is there.
    """
    path = given_files.path_of(name)
    if not name or (given_files.is_there(path) and not given_files.is_folder(path)):
        raise RecipeError(
            f"{step} has library {name or 'without a name'}, which is no folder. Name one, or a new one."
        )


def kept_in(name: str | None, calibration: Calibration, model: nn.Module, *about: object) -> Calibration:
    """A calibration whose pieces are kept in a folder, in one of its own for this model, this text and whatever else they depend on.

    Args:
        name: of the folder; the calibration is as it was if none is given.
        about: whose texts tell what else they depend on.
    """
    if name is None:
        return calibration
    digest = hashlib.sha256(repr((about, installed_versions())).encode())
    for windows in (calibration.windows.tokens, calibration.windows.mask):
        digest.update(windows.cpu().numpy().tobytes())
    for path, value in model.named_parameters():
        flat = value.detach().flatten()
        some = flat[:: max(len(flat) // SAMPLED, 1)].float().cpu()
        digest.update(f"{path} {tuple(value.shape)} {value.dtype}".encode() + some.numpy().tobytes())
    told_by_first = processes.broadcast_from_first(digest.hexdigest)
    folder = given_files.path_of(name) / told_by_first[:DIGITS]
    return replace(calibration, journal=Library(folder, calibration.journal))
