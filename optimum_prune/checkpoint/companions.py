"""Companions of a checkpoint: files beside its weights that say what transformers does not write again, carried along as they are."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from fnmatch import fnmatch
from pathlib import Path

from optimum_prune.checkpoint.own_code import code_files

PROCESSORS = (
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "chat_template.json",
)
"""Of what prepares images, video and sound."""
TOKENIZERS = (
    "*.model",
    "*.model.v*",
    "*.tiktoken",
    "tekken.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)
"""What other programs make a tokenizer of, such as llama.cpp."""
TERMS = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")
"""On which the model may be used."""
TEMPLATES = "additional_chat_templates"
"""A folder of them; a tokenizer reads and writes it."""


def belongs_beside(name: str, *, tokenizer: bool = True) -> bool:
    """Whether a file of this name is a companion.

    Args:
        tokenizer: whether the tokenizer's are, too: not where another tokenizer is saved.
    """
    patterns = (*PROCESSORS, *TERMS, *(TOKENIZERS if tokenizer else ()))
    return any(fnmatch(name, pattern) for pattern in patterns)


def companions_of(
    names: Iterable[str], file_of: Callable[[str], Path | None], *, tokenizer: bool = True, code: bool = False
) -> tuple[Path, ...]:
    """The files that belong beside a checkpoint's weights, whatever is done to them.

    Args:
        names: of all its files.
        file_of: where a file of a name is, if it is there.
        tokenizer: whether those of its tokenizer do.
        code: whether that does which prepares images, video and sound, too; a model's own and a tokenizer's are saved with them.
    """
    found = [file_of(name) for name in names if belongs_beside(name, tokenizer=tokenizer)]
    if code:
        processors = [file for file in found if file is not None and file.name in PROCESSORS]
        found += [file_of(name) for name in sorted(code_files(processors, file_of) & set(names))]
    return tuple(file for file in found if file is not None)


def carry(companions: Iterable[Path], folder: Path) -> None:
    """Copies companions into a folder, but for those that were written there already."""
    for file in companions:
        if not (folder / file.name).exists():
            shutil.copyfile(file, folder / file.name)
