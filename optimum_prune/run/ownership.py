"""What this program wrote, and may therefore replace or remove; everything else is a person's."""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from optimum_prune.errors import OutputError

CHECKPOINT = re.compile(
    r"config\.json|generation_config\.json|README\.md|LICENSE[\w.-]*|.*\.safetensors|.*\.safetensors\.index\.json"
    r"|pytorch_model.*\.bin|pytorch_model.*\.index\.json|.*\.gguf"
    r"|tokenizer.*\.json|tokenizer\.model|tekken\.json|.*\.tiktoken|spiece\.model|sentencepiece.*\.model"
    r"|vocab\.(json|txt)|merges\.txt|special_tokens_map\.json|added_tokens\.json|chat_template\..*"
    r"|(pre|video_pre)?processor_config\.json|modeling_pruned\.py|(modeling|configuration|tokenization|processing)_\w+\.py"
    r"|quant(iz|o|ization)[\w.-]*\.json|recipe\.yaml|\.DS_Store"
)
"""Names of files that checkpoints consist of."""
ASIDE = "compression"
REPORTS = ("recipe.yaml", "report.json", "report.html", "cuts.json")
"""In the folder `compression`."""
STAGED = {
    re.compile(r"\d+-[\w.-]+"): stat.S_ISDIR,
    re.compile("journal"): stat.S_ISDIR,
    re.compile(r"state\.json(\.partial)?"): stat.S_ISREG,
}
"""What lies in a folder of what is unfinished, by its name, and what it must be: a folder or a file."""
JOURNALED = re.compile(r"\d+-[0-9a-f]+\.safetensors|partial|begun\.json(\.partial)?")
"""What lies in a journal: files."""
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
    report = _report(folder)
    if report is None and entries and not (folder / "config.json").is_file():
        return [entry.name for entry in entries]
    artefacts = {step.get("name") for step in report["passes"] if isinstance(step, dict)} if report else set()
    found = []
    for entry in entries:
        if entry.is_symlink():
            found.append(entry.name)
        elif entry.is_dir():
            if report is not None and entry.name == ASIDE:
                found += [f"{ASIDE}/{each.name}" for each in sorted(entry.iterdir()) if each.name not in REPORTS]
            elif entry.name not in artefacts:
                found.append(f"{entry.name}/")
        elif not entry.is_file() or not CHECKPOINT.fullmatch(entry.name):
            found.append(entry.name)
    return found


def _report(folder: Path) -> dict[str, Any] | None:
    """The report in an output folder, if it is one of ours."""
    try:
        plain = json.loads((folder / ASIDE / "report.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    fits = isinstance(plain, dict) and isinstance(plain.get("passes"), list) and "verified" in plain
    return plain if fits else None


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
            strange = [entry.name for entry in sorted(folder.iterdir()) if not _is_staged(entry)]
        except OSError as error:
            strange, why = [], f"cannot be looked through ({error.strerror})"
        if strange:
            why = f"holds {strange[0]}, which no run leaves there"
    if why:
        raise OutputError(
            f"{folder} is where a run keeps what is unfinished, and it {why}, so it is left alone. Rename it, or name another --output."
        )


def _is_staged(entry: Path) -> bool:
    """Whether an entry of a folder for what is unfinished is one that a run leaves there."""
    mode = entry.lstat().st_mode
    fits = any(name.fullmatch(entry.name) and kind(mode) for name, kind in STAGED.items())
    if not fits or not entry.is_dir():
        return fits
    if entry.name != "journal":
        return (entry / "config.json").is_file()
    return all(JOURNALED.fullmatch(each.name) and stat.S_ISREG(each.lstat().st_mode) for each in entry.iterdir())
