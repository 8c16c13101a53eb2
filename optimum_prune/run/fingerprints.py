"""Fingerprints of models, windows and weights, by which a run that goes on later knows that they are the same."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor

from optimum_prune.errors import CheckpointError
from optimum_prune.machine import processes, tensor_files
from optimum_prune.machine.watched_files import WEIGHTS
from optimum_prune.options import as_plain
from optimum_prune.plan.plan import Plan
from optimum_prune.text.windows import Texts, Windows

HEAD = 2**20
"""How much of a file of weights its fingerprint reads; safetensors begin with the names and shapes of all."""


def identity(plan: Plan, texts: Texts) -> dict[str, str | None]:
    """What must be equal for a run to go on where another stopped, each by the word for it; None is equal to nothing."""
    settings, source = plan.recipe.settings, plan.source
    path = Path(source.name).expanduser()
    if source.in_memory:
        model = None
    elif path.exists():
        model = files_fingerprint(path)
    else:
        model = f"{source.name} {getattr(source.config, '_commit_hash', None)}"
    return {
        "the model": model,
        "the calibration": windows_fingerprint(texts.calibration),
        "the evaluation": windows_fingerprint(texts.evaluation),
        **({"the training": training_fingerprint(plan, texts)} if texts.training else {}),
        "dtype, device or seed": f"{settings.dtype} {plan.device} {settings.seed}",
        "the number of processes": str(processes.size()),
        "the version of optimum-prune": version("optimum-prune"),
    }


def files_fingerprint(path: Path, kinds: Sequence[str] = (*WEIGHTS, ".json")) -> str:
    """The fingerprint of a weights file, or of a checkpoint's folder: of its files' names, sizes, times and beginnings.

    Args:
        kinds: of the files in a folder, by how their names end.
    """
    there = [path] if path.is_file() else sorted(file for file in path.iterdir() if file.suffix in kinds)
    files = [file for file in there if file.is_file()]
    digest = hashlib.sha256()
    for file in files:
        about = file.stat()
        digest.update(f"{file.name} {about.st_size} {about.st_mtime_ns} ".encode())
        with file.open("rb") as opened:
            digest.update(opened.read(HEAD))
    return digest.hexdigest()


def check_unchanged(model: str, before: str | None) -> None:
    """Refuses a model whose files changed while a run read them.

    Args:
        before: their fingerprint when the run began; None if nobody can tell.

    Raises:
        CheckpointError: they did.
    """
    path = Path(model).expanduser()
    if before is None or not path.exists():
        return
    try:
        now = files_fingerprint(path)
    except OSError:
        now = "gone"
    if now != before:
        raise CheckpointError(
            f"The files of {model} changed while they were read, so what was made may be of two models. Run it again when they are as they "
            f"should be."
        )


def code_fingerprint(kind: type) -> str:
    """The fingerprint of the source of the module in which a class is defined; nothing where there is none to read."""
    try:
        file = inspect.getsourcefile(kind)
        return hashlib.sha256(Path(file).read_bytes()).hexdigest() if file else ""
    except (OSError, TypeError):  # typed into an interpreter, or made on the fly
        return ""


def windows_fingerprint(windows: Windows | None) -> str:
    """The fingerprint of token windows."""
    if windows is None:
        return "none"
    digest = hashlib.sha256(str(tuple(windows.tokens.shape)).encode())
    for part in windows.parts(tensor_files.CHUNK):  # they may be mapped from a file
        for values in (part.tokens, part.mask, part.predicted):
            digest.update(values.cpu().numpy().tobytes())
    return digest.hexdigest()


def training_fingerprint(plan: Plan, texts: Texts) -> str:
    """The fingerprint of the text to train on, and of how its domains are mixed."""
    digest = hashlib.sha256(repr(as_plain(plan.recipe.training)).encode())
    for domain in texts.training:
        for windows in (domain.windows, domain.held_out):
            digest.update(windows_fingerprint(windows).encode())
        digest.update(f"{domain.name} {domain.weight} {domain.reference}".encode())
    return digest.hexdigest()


def tensor_fingerprint(tensor: Tensor) -> str:
    """The fingerprint of a tensor: of its dtype, its shape and all its values."""
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    elements, at_once = tensor.detach().flatten(), tensor_files.CHUNK // tensor.element_size()
    for start in range(0, len(elements), at_once):
        digest.update(elements[start : start + at_once].view(torch.uint8).cpu().numpy().data)
    return digest.hexdigest()
