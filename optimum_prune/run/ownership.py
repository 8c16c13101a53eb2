"""What this program wrote, and may therefore replace or remove; everything else is a person's."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from optimum_prune.checkpoint.companions import TEMPLATES, belongs_beside
from optimum_prune.checkpoint.own_code import code_files
from optimum_prune.errors import OutputError
from optimum_prune.machine.given_files import mapping_in

CHECKPOINT = re.compile(
    r"config\.json|generation_config\.json|README\.md|LICENSE[\w.-]*|.*\.safetensors|.*\.safetensors\.index\.json"
    r"|pytorch_model.*\.bin|pytorch_model.*\.index\.json|.*\.gguf"
    r"|tokenizer.*\.json|tokenizer\.model|tekken\.json|.*\.tiktoken|spiece\.model|sentencepiece.*\.model"
    r"|vocab\.(json|txt)|merges\.txt|special_tokens_map\.json|added_tokens\.json|chat_template\..*"
    r"|(pre|video_pre)?processor_config\.json|quant(iz|o|ization)[\w.-]*\.json|\.DS_Store"
)
"""Names of files that checkpoints consist of, beside code, whose names its config says, and companions."""
WEIGHTS = (".safetensors", ".bin", ".gguf")
QUANTIZED = "recipe.yaml"
"""In a checkpoint of packed weights: how llm-compressor made it."""
ARTEFACT = re.compile(r"[A-Za-z0-9][\w-]*")
"""The name of an exporter, which its folder has."""
ASIDE = "compression"
REPORTS = ("recipe.yaml", "report.json", "report.html", "cuts.json")
"""In the folder `compression`."""
STAGED = {
    re.compile(r"\d+-[\w.-]+"): stat.S_ISDIR,
    re.compile(r"journal(-\d+)?|training"): stat.S_ISDIR,
    re.compile(r"(state|finished)\.json(\.partial)?"): stat.S_ISREG,
}
"""What lies in a folder of what is unfinished, by its name, and what it must be: a folder or a file."""
JOURNALED = re.compile(r"\d+-[0-9a-f]+\.safetensors|partial|begun\.json(\.partial)?")
"""What lies in a journal: files."""
TRAINED = re.compile(r"\d+-[\w.-]+")
"""What lies in a folder for training: one for each pass."""
NAMED = 3
"""So many files are named in an error."""


def check_replaceable(output: Path, inputs: Iterable[Path] = ()) -> None:
    """Refuses an output folder that holds anything else than what this program wrote, or a checkpoint.

    Args:
        inputs: what this run reads.

    Raises:
        OutputError: naming what would be lost.
    """
    if output.is_symlink() or not output.is_dir():
        raise OutputError(
            f"The output {output} is no folder with a model, so it is not overwritten. Name another --output."
        )
    if os.path.ismount(output):
        raise OutputError(
            f"The output {output} is where a disk is mounted, which cannot be replaced. Name a folder on it as --output."
        )
    read = sorted({str(path) for path in inputs if _lies_in(path, output)})
    if read:
        raise OutputError(
            f"The output {output} holds what this run reads, {', '.join(read[:NAMED])}, which would be lost. Name another --output, or "
            f"move it elsewhere."
        )
    try:
        others = foreign(output)
    except OSError as error:
        raise OutputError(
            f"The output {output} cannot be looked through: {error.strerror}. Name another --output."
        ) from error
    if others:
        named = ", ".join(others[:NAMED]) + (f" and {len(others) - NAMED} more" if len(others) > NAMED else "")
        raise OutputError(
            f"The output {output} holds what is no model of ours, {named}, which would be lost. Name another --output, or move it "
            f"elsewhere."
        )


def _lies_in(path: Path, folder: Path) -> bool:
    try:
        found, inside = path.expanduser().resolve(), folder.resolve()
    except (OSError, RuntimeError):
        return False
    return found.exists() and (found == inside or inside in found.parents)


def foreign(folder: Path) -> list[str]:
    """The entries of a folder that are neither a checkpoint's nor from a run of ours; all, if it is neither's."""
    entries = sorted(folder.iterdir())
    report, config = _report(folder), mapping_in(folder / "config.json")
    weights = any(entry.suffix in WEIGHTS for entry in entries)
    if report is None and entries and not (weights and {"model_type", "architectures"} & config.keys()):
        return [entry.name for entry in entries]
    artefacts = _artefacts(report or {})
    code = code_files(sorted(folder.glob("*config.json")), folder.joinpath)
    found = []
    for entry in entries:
        if entry.is_symlink():
            found.append(entry.name)
        elif entry.is_dir():
            if report is not None and entry.name == ASIDE:
                found += _strange(entry, lambda name: name in REPORTS)
            elif entry.name == TEMPLATES:
                found += _strange(entry, lambda name: name.endswith(".jinja"))
            elif entry.name not in artefacts:
                found.append(f"{entry.name}/")
        elif not entry.is_file() or not (
            CHECKPOINT.fullmatch(entry.name)
            or belongs_beside(entry.name)
            or entry.name in code
            or (entry.name == QUANTIZED and "quantization_config" in config)
        ):
            found.append(entry.name)
    return found


def _strange(folder: Path, known: Callable[[str], bool]) -> list[str]:
    """The entries of a folder within another that are no files of a known name."""
    return [
        f"{folder.name}/{each.name}"
        for each in sorted(folder.iterdir())
        if each.is_symlink() or not each.is_file() or not known(each.name)
    ]


def _artefacts(report: Mapping[str, Any]) -> set[str]:
    """The folders of what a run exported, by its report."""
    steps = [step for step in report.get("passes", ()) if isinstance(step, dict) and step.get("stage") == "EXPORT"]
    names = {str(step.get("name")) for step in steps}
    return {name for name in names if ARTEFACT.fullmatch(name)}


def _report(folder: Path) -> dict[str, Any] | None:
    """The report in an output folder, if it is one of ours."""
    plain = mapping_in(folder / ASIDE / "report.json")
    return plain if isinstance(plain.get("passes"), list) and "verified" in plain else None


def check_unfinished(folder: Path) -> None:
    """Refuses a folder for what is unfinished that is not ours: it is neither used nor removed.

    Raises:
        OutputError: it is a link, a file, another user's, or holds anything that no run leaves there.
    """
    if not os.path.lexists(folder):
        return
    why = ""
    if folder.is_symlink():
        why = "is a link"
    elif not folder.is_dir():
        why = "is no folder"
    elif hasattr(os, "getuid") and folder.stat().st_uid != os.getuid():
        why = "is another user's"
    else:
        try:
            named = mapping_in(folder / "state.json").get("checkpoint")
            strange = [entry.name for entry in sorted(folder.iterdir()) if not _is_staged(entry, named)]
        except OSError as error:
            strange, why = [], f"cannot be looked through ({error.strerror})"
        if strange:
            why = f"holds {strange[0]}, which no run leaves there"
    if why:
        raise OutputError(
            f"{folder} is where a run keeps what is unfinished, and it {why}, so it is left alone. Rename it, or name another --output."
        )


def _is_staged(entry: Path, named: object) -> bool:
    """Whether an entry of a folder for what is unfinished is one that a run leaves there.

    Args:
        named: the checkpoint that its state names; another one, which a kill left unnamed, holds nothing else.
    """
    mode = entry.lstat().st_mode
    fits = any(name.fullmatch(entry.name) and kind(mode) for name, kind in STAGED.items())
    if not fits or not entry.is_dir():
        return fits
    if entry.name == "training":
        return all(TRAINED.fullmatch(each.name) and stat.S_ISDIR(each.lstat().st_mode) for each in entry.iterdir())
    if not entry.name.startswith("journal"):
        return (entry / "config.json").is_file() and (entry.name == named or not foreign(entry))
    return all(JOURNALED.fullmatch(each.name) and stat.S_ISREG(each.lstat().st_mode) for each in entry.iterdir())
