"""What may be published of a run: places by their names from the folder in which it ran, or by their names alone; no code that is not there."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from optimum_prune.checkpoint.saving import lies_beside
from optimum_prune.machine.given_files import is_there, path_of

_PART = r"[^\s/'\"`<>|,;:()\[\]{}]+"
ABSOLUTE = re.compile(r"(?:/|~[\w.-]*/|\.\.[/\\]|[A-Za-z]:[\\/]|\\\\)[^\n]+")
"""A text that is the name of something on somebody's machine, outside of the current folder."""
WINDOWS = re.compile(r"[A-Za-z]:[\\/]|\\\\|\.\.\\")
"""How such a name begins on Windows."""
WITHIN = re.compile(
    rf"(?<![\w./\\:~-])(?:~[\w.-]*(?:/{_PART})+|(?:\.\./)+{_PART}(?:/{_PART})*|(?:/{_PART}){{2,}}|[A-Za-z]:[\\/][^\s'\"`<>|,;()]+)"
)
"""Such a name within a text."""
PLACES = re.compile(r"(.*_)?(name_or_path|file|path|dir|folder|directory)s?")
"""Fields of JSON files that may say where something was read from."""
HOMES = ("/home/", "/Users/", "/root/", "/tmp/", "/private/", "/var/folders/", "C:\\Users\\")
"""Where people's own files lie."""
WORDS = re.compile(r"added_tokens.*|.*_tokens?|.*templates?|vocab|merges|tools?")
"""Fields of JSON files that hold what a model reads and writes, which stays as it is."""
VOCABULARIES = ("tokenizer.json", "vocab.json", "tekken.json", "added_tokens.json", "special_tokens_map.json")
"""JSON files of nothing else."""
LARGEST = 2**22
"""Bytes of a JSON file that says where anything is; larger ones hold vocabularies."""


# Names of places


def is_place(name: str) -> bool:
    """Whether a name is that of a file or a folder here, and not one of the Hub."""
    return name.startswith((".", "/", "~")) or ABSOLUTE.fullmatch(name) is not None or is_there(path_of(name))


def from_here(name: str) -> str | None:
    """The name of a file or a folder from the current folder, with a dot in front, which no name of the Hub has; None if it lies elsewhere."""
    here, home = Path.cwd(), path_of("~").absolute()
    if here in home.parents or (WINDOWS.match(name) and os.name != "nt"):  # what lies in it tells whose it is
        return None
    absolute = Path(os.path.abspath(path_of(name)))
    for path in (absolute, absolute.parent.resolve() / absolute.name):
        if path.is_relative_to(here):
            return f"./{path.relative_to(here)}" if path != here else "."
    return None


def place(name: str) -> str:
    """The name of a file or a folder from the current folder, or alone if it lies elsewhere; either with a dot in front."""
    return from_here(name) or f"./{last_part(name)}"


def last_part(name: str) -> str:
    """What a file or a folder is called, on whatever system."""
    windows = WINDOWS.match(name)
    path = (PureWindowsPath if windows else PurePosixPath)(name)
    if path.name in ("", "..") and not windows:
        path = PurePosixPath(os.path.abspath(path_of(name)))
    is_home = path.parent.name in ("home", "Users") or str(path) == str(path_of("~"))
    return "home" if is_home else path.name  # it is called as its owner is


def scrubbed(plain: Any) -> Any:
    """Plain data in which no text says where anything lies outside of the current folder."""
    if isinstance(plain, Mapping):
        return {scrubbed(key): scrubbed(value) for key, value in plain.items()}
    if isinstance(plain, (list, tuple)):
        return [scrubbed(value) for value in plain]
    return _scrubbed(plain) if isinstance(plain, str) else plain


def _scrubbed(text: str) -> str:
    if ABSOLUTE.fullmatch(text) and (" " not in text or is_there(path_of(text))):
        return place(text)
    text = text.replace(f"{path_of('~')}/", "~/")  # it may have spaces in its name, as the other may
    if from_here(".") is not None:
        text = text.replace(f"{Path.cwd()}/", "./")
    return WITHIN.sub(lambda match: place(match[0]), text)


# Files that others wrote


def clean_files(folder: Path) -> None:
    """Takes out of the JSON files of an output folder where on this machine anything lay, and what names code that does not lie beside them."""
    for file in sorted(folder.rglob("*.json")):
        if file.name in VOCABULARIES or file.is_symlink() or not file.is_file() or file.stat().st_size > LARGEST:
            continue
        try:
            plain = json.loads(file.read_text(encoding="utf-8"))
        except (ValueError, RecursionError):  # of somebody else's making
            continue
        cleaned = _cleaned(plain, "", file.parent)
        if cleaned != plain:
            file.write_text(json.dumps(cleaned, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _cleaned(plain: Any, field: str, folder: Path) -> Any:
    """A value of a JSON file in a folder, without what is not to be published.

    Args:
        field: the name of the field that it is in.
    """
    if WORDS.fullmatch(field):
        return plain
    if isinstance(plain, dict):
        cleaned = {name: _cleaned(value, name, folder) for name, value in plain.items()}
        if isinstance(named := plain.get("auto_map"), dict):
            cleaned["auto_map"] = {kind: where for kind, where in named.items() if lies_beside(where, folder)}
        return {name: value for name, value in cleaned.items() if name != "auto_map" or value}
    if isinstance(plain, list):
        return [_cleaned(value, field, folder) for value in plain]
    if (
        isinstance(plain, str)
        and ABSOLUTE.fullmatch(plain)
        and (PLACES.fullmatch(field) or plain.startswith(_homes()))
    ):
        return last_part(plain)
    return plain


def _homes() -> tuple[str, ...]:
    return (*HOMES, f"{path_of('~')}/", f"{Path.cwd()}/")
