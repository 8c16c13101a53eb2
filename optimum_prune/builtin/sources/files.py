"""Sources that read text files: plain text, JSON lines and Parquet."""

from __future__ import annotations

import codecs
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from optimum_prune.errors import TextError, reason
from optimum_prune.hooks.marker import hookimpl
from optimum_prune.text.conversations import Conversation
from optimum_prune.text.source import Source, check_column, checked
from optimum_prune.text.text import Text

PIECE = 2**20
"""Bytes of a plain text that are read at a time."""
LONGEST_LINE = 2**28
"""Bytes of a line of JSON, which is read whole."""


def _file(text: Text) -> Path:
    assert text.file is not None, "a source with suffixes is given texts that name a file"
    return text.file


def _read_txt(text: Text) -> Iterator[str]:
    """The pieces of a file as Python reads text: without a byte order mark, and with lines that end alike."""
    path, before = _file(text), 0
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    lines = io.IncrementalNewlineDecoder(decoder, translate=True)
    with _opened(path) as file:
        while True:
            pending, read = len(decoder.getstate()[0]), file.read(PIECE)
            try:
                yield lines.decode(read, final=not read)
            except UnicodeDecodeError as error:
                raise TextError(
                    f"The text file {path} is not UTF-8 at byte {before - pending + error.start}. Convert it, or name another."
                ) from error
            before += len(read)
            if not read:
                return


def _read_jsonl(text: Text) -> Iterator[str | Conversation | None]:
    path = _file(text)
    with _opened(path) as lines:
        number = 0
        while line := lines.readline(LONGEST_LINE + 1):
            number += 1
            if len(line) > LONGEST_LINE:
                raise TextError(
                    f"Line {number} of {path} is longer than {LONGEST_LINE:,} bytes. Put each document on a line."
                )
            if not line.strip():
                continue
            try:
                document = json.loads(line)[text.column]
            except (ValueError, LookupError, TypeError, RecursionError) as error:
                raise TextError(
                    f"Line {number} of {path} is not a JSON object with a text in '{text.column}'. Mend it, or name another 'column'."
                ) from error
            if document is not None:
                yield checked(document, f"Line {number} of {path}", text)


def _read_parquet(text: Text) -> Iterator[Any]:
    import pyarrow
    import pyarrow.parquet

    path = _file(text)
    try:
        table = pyarrow.parquet.ParquetFile(path)
        check_column(text.column, table.schema_arrow.names, text)
        kind = table.schema_arrow.field(table.schema_arrow.names.index(text.column)).type
        if not _is_text(kind):
            raise TextError(
                f"The column '{text.column}' of {path} holds {kind}, and no text. Name another as 'column' in the recipe."
            )
        for batch in table.iter_batches(columns=[text.column]):
            yield from (document or None for document in batch.column(0).to_pylist())
    except (pyarrow.ArrowException, OSError, ValueError, LookupError) as error:
        raise TextError(f"{path} is not a Parquet file that can be read ({reason(error)}). Name another.") from error


def _is_text(kind: Any) -> bool:
    """Whether a column holds texts, each spelled out or by its number in a list of them; conversations; or nothing but nulls."""
    from pyarrow import types

    if types.is_list(kind) or types.is_large_list(kind):
        return bool(types.is_struct(kind.value_type))
    kind = kind.value_type if types.is_dictionary(kind) else kind
    return str(kind) in ("string", "large_string", "string_view", "null")  # string views are of pyarrow 16


def _opened(path: Path) -> io.BufferedReader:
    try:
        return path.open("rb")
    except OSError as error:
        raise TextError(f"The text file {path} cannot be read: {error.strerror}. Name another.") from error


@hookimpl
def calibration_sources() -> Iterator[Source]:
    yield Source("txt", _read_txt, (".txt", ".text", ".md"), pieces=True)
    yield Source("jsonl", _read_jsonl, (".jsonl", ".ndjson"))
    yield Source("parquet", _read_parquet, (".parquet",))
