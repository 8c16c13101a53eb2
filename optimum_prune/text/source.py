"""Sources of text: what reads a kind of file or a dataset, which of them reads the text that is named, and what a row of it may be."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from optimum_prune.errors import OptimumPruneError, TextError, found_no_memory, reason, shown, unknown
from optimum_prune.text.conversations import Conversation, conversation_in
from optimum_prune.text.text import Text


@dataclass(frozen=True)
class Source:
    """A way to get text, added by a plugin's `calibration_sources` hook.

    With `suffixes`, `--text` files that end so are read by it; without, `--dataset NAME:CONFIG:SPLIT` is, where NAME is its name.
    """

    name: str
    read: Callable[[Text], Iterable[str | Conversation | None]]
    """The documents of a text, in order, or conversations, as lists of messages; None for a row that has none."""
    suffixes: tuple[str, ...] = ()
    pieces: bool = False
    """Whether what it reads are the pieces of one document, instead of documents."""


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
    suffixes, suffix = _by_suffix(sources), text.file.suffix.lower()
    if suffix not in suffixes:
        raise TextError(unknown("kind of text file", suffix, suffixes) + f" Convert {text.file} to one of these.")
    return suffixes[suffix]


def parts_of(text: Text, sources: Mapping[str, Source]) -> Iterator[tuple[Source, Text]]:
    """The source of a text; of a folder, those of the files in it that one reads, by their names, each with the text of its own.

    Raises:
        TextError: no source reads such a file, or any in the folder.
    """
    if not text.is_folder:
        yield source_of(text, sources), text
        return
    suffixes = _by_suffix(sources)
    files = [file for file in text.files if file.suffix.lower() in suffixes]
    if not files:
        raise TextError(
            f"No file in the folder {text.file} ends in {', '.join(sorted(suffixes))}. Name another, or convert them."
        )
    for file in files:
        yield suffixes[file.suffix.lower()], replace(text, text=str(file))


def _by_suffix(sources: Mapping[str, Source]) -> dict[str, Source]:
    """The source of each kind of file."""
    return {suffix: source for source in sources.values() for suffix in source.suffixes}


def documents(source: Source, text: Text) -> Iterator[str | Conversation]:
    """The documents of a text as its source reads them, or conversations, without those that are null.

    Raises:
        TextError: one is no text, or the source fails; the message names the row, or the source.
    """
    rows = _guarded(source, text, lambda each: iter(source.read(each)))
    for number, row in enumerate(_guarded_rows(source, text, rows), start=1):
        if row is not None:
            yield row if isinstance(row, Conversation) else checked(row, f"Row {number} of {text.describe()}", text)


def _guarded_rows(source: Source, text: Text, rows: Iterator[Any]) -> Iterator[Any]:
    nothing = object()
    while (row := _guarded(source, text, lambda _: next(rows, nothing))) is not nothing:
        yield row


def _guarded(source: Source, text: Text, work: Callable[[Text], Any]) -> Any:
    """What a source does, whose errors become sentences."""
    try:
        return work(text)
    except OptimumPruneError:
        raise
    except (
        Exception,
        SystemExit,
        GeneratorExit,
    ) as error:  # of a plugin, of a library that reads a file, or of the network
        if found_no_memory(error):
            raise
        raise TextError(
            f"The text {text.describe()} cannot be read by '{source.name}': {type(error).__name__}: {reason(error)} Mend it, or name another."
        ) from error


def checked(row: object, where: str, text: Text) -> str | Conversation:
    """A row of a table as a text, or as a conversation.

    Args:
        where: which row it is, for the error.

    Raises:
        TextError: it is something else, or text with half of a character in it.
    """
    if conversation := conversation_in(row, where):
        return conversation
    if not isinstance(row, str):
        kinds = {
            bool: "true or false",
            int: "a number",
            float: "a number",
            bytes: "bytes",
            list: "a list",
            dict: "a mapping",
        }
        kind = kinds.get(type(row), f"a value of type {type(row).__name__}")
        raise TextError(
            f"{where} has {kind} in '{text.column}', {shown(row)}, where a text should be. Mend it, or name another 'column'."
        )
    try:
        row.encode()
    except UnicodeEncodeError as error:
        raise TextError(
            f"{where} has half of a character in '{text.column}' ({row[error.start]!a}, at character {error.start}), which is no text. Mend it."
        ) from error
    return row


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
