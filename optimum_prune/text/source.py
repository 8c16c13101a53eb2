"""Sources of text: what reads a kind of file or a dataset, and which of them reads the text that is named."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from optimum_prune.errors import TextError, unknown
from optimum_prune.text.text import Text


@dataclass(frozen=True)
class Source:
    """A way to get text, added by a plugin's `calibration_sources` hook.

    With `suffixes`, `--text` files that end so are read by it; without, `--dataset NAME:CONFIG:SPLIT` is, where NAME is its name.
    """

    name: str
    read: Callable[[Text], Iterable[str]]
    """The documents of a text, in order."""
    suffixes: tuple[str, ...] = ()


def source_of(text: Text, sources: Mapping[str, Source]) -> Source:
    """The source that reads a text: by the suffix of a file, by the name of a dataset, or else the Hub's.

    Args:
        sources: by their names.

    Raises:
        TextError: no source reads such files.
    """
    if text.file is None:
        named = sources.get(text.dataset_parts[0])
        return named if named is not None and not named.suffixes else sources["hub"]
    suffixes = {suffix: source for source in sources.values() for suffix in source.suffixes}
    suffix = text.file.suffix.lower()
    if suffix not in suffixes:
        raise TextError(unknown("kind of text file", suffix, suffixes) + f" Convert {text.file} to one of these.")
    return suffixes[suffix]


def check_column(column: str, columns: Iterable[str], text: Text) -> None:
    """Refuses a column that a table does not have.

    Raises:
        TextError: with the names of those that it has.
    """
    if column not in columns:
        raise TextError(
            unknown("column", column, columns, f"Columns of {text.describe()}")
            + " Name one as 'column' in the recipe."
        )
