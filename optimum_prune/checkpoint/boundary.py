"""The boundary of a model: its folder. Nothing is read that a link or a name leads to elsewhere, and nothing that is no plain file."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from optimum_prune.checkpoint.companions import TEMPLATES, belongs_beside
from optimum_prune.errors import CheckpointError, cut, printable
from optimum_prune.machine.given_files import flaw
from optimum_prune.machine.tensor_files import INDICES, LONGEST, is_plain, listed

SUFFIXES = (".json", ".safetensors", ".bin")
"""Of files that are read, beside those that are carried along."""
NAMING = ("transformers_weights", "configuration_files", "fast_tokenizer_files")
"""Fields of JSON files that name other files of the folder."""
STALE = ("special_tokens_map_file", "added_tokens_file")
"""Fields in which a tokenizer notes where it was once read from; nothing reads them."""
FOUND = ("tokenizer_file", "vocab_file", "merges_file", "spm_file")
"""Files that transformers finds in a tokenizer's folder; before version 5.10, only where its config does not name others."""


def check_folder(folder: Path, *, code: bool = False) -> None:
    """Refuses a model's folder if one of the files that may be read of it lies elsewhere or is no file that can be read.

    Args:
        code: whether its code may be read.

    Raises:
        CheckpointError: the first that is not as it should be.
    """
    try:
        files = list(_files(folder, (*SUFFIXES, ".py") if code else SUFFIXES))
    except OSError as error:
        raise CheckpointError(
            f"The model's folder {printable(str(folder))} cannot be read: {error.strerror}."
        ) from error
    for file in files:
        name = printable(str(file))
        if found := flaw(file):
            raise CheckpointError(f"The model's file {name} {found}. Mend it, or fetch the model again.")
        if not is_inside(file, folder):
            place = cut(printable(str(file.resolve())), LONGEST)
            raise CheckpointError(
                f"The model's file {name} is a link that leads outside of its folder, to {place}, and nothing "
                f"outside is read. Put the file itself there, or name the folder that it is in."
            )


def check_names(plain: Mapping[str, Any], where: str) -> None:
    """Refuses what a JSON file of a model says if it names a file outside of the model's folder.

    Args:
        where: the file, for the message.

    Raises:
        CheckpointError: it does.
    """
    for key in set(NAMING) & set(plain):
        for name in plain[key] if isinstance(plain[key], list) else [plain[key]]:
            if isinstance(name, str) and not is_plain(name):
                raise CheckpointError(
                    f"The '{key}' of {where} names {cut(printable(name), LONGEST)}, which is outside of the model's folder, and nothing outside "
                    f"is read. Take it out."
                )


def check_tokenizer_files(plain: Mapping[str, Any], folder: Path, where: str) -> None:
    """Refuses the config of a tokenizer that names files which are there and lie elsewhere: some versions of transformers read them.

    Args:
        where: the config, for the message.

    Raises:
        CheckpointError: it does.
    """
    for key, value in plain.items():
        if not str(key).endswith("_file") or key in STALE or not isinstance(value, str) or is_plain(value):
            continue
        if os.path.lexists(value) and not is_inside(Path(value), folder):
            raise CheckpointError(
                f"The '{key}' of {where} is {cut(printable(value), LONGEST)}, which is outside of the model's folder, and nothing outside is "
                f"read. Take it out."
            )


def found_files(plain: Mapping[str, Any]) -> dict[str, None]:
    """The arguments with which transformers takes a tokenizer's files from its folder, whatever its config says of them."""
    return {key: None for key in FOUND if key in plain}


def _files(folder: Path, suffixes: tuple[str, ...]) -> Iterator[Path]:
    """The files that may be read of a model's folder, as they are called there."""
    for entry in sorted(folder.iterdir()):
        if entry.name == TEMPLATES:
            yield from sorted(entry.glob("*.jinja"))
        elif entry.suffix in suffixes or (belongs_beside(entry.name) and not entry.is_dir()):
            yield entry
            if entry.name in INDICES and not flaw(entry):
                yield from filter(os.path.lexists, listed(entry, all_there=False))


def is_inside(file: Path, folder: Path) -> bool:
    """Whether a file lies in a model's folder or, where that is a snapshot of the Hub's cache, in the cache of the model."""
    home = folder.resolve()
    blobs = home.parent.parent / "blobs"
    homes = [home, blobs.resolve()] if home.parent.name == "snapshots" and blobs.is_dir() else [home]
    return any(file.resolve().is_relative_to(each) for each in homes)
