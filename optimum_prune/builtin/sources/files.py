"""Sources that read text files: plain text, JSON lines and Parquet."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from optimum_prune.errors import TextError, reason
from optimum_prune.hooks.marker import hookimpl
from optimum_prune.text.source import Source, check_column
from optimum_prune.text.text import Text


def _file(text: Text) -> Path:
    assert text.file is not None, "a source with suffixes is given texts that name a file"
    return text.file


def _read_txt(text: Text) -> Iterator[str]:
    path = _file(text)
    try:
        yield path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise TextError(
            f"The text file {path} is not UTF-8 at byte {error.start}. Convert it, or name another."
        ) from error


def _read_jsonl(text: Text) -> Iterator[str]:
    path = _file(text)
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                document = json.loads(line)[text.column]
            except (ValueError, KeyError, TypeError, IndexError) as error:
                document = error
            if not isinstance(document, str):
                raise TextError(
                    f"Line {number} of {path} is not a JSON object with a text in '{text.column}'. Mend it, or name another 'column'."
                )
            yield document


def _read_parquet(text: Text) -> Iterator[str]:
    import pyarrow
    import pyarrow.parquet

    path = _file(text)
    try:
        table = pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise TextError(f"{path} is not a Parquet file that can be read ({reason(error)}). Name another.") from error
    check_column(text.column, table.schema_arrow.names, text)
    for batch in table.iter_batches(columns=[text.column]):
        yield from (document for document in batch.column(0).to_pylist() if document)


@hookimpl
def calibration_sources() -> Iterator[Source]:
    yield Source("txt", _read_txt, (".txt", ".text", ".md"))
    yield Source("jsonl", _read_jsonl, (".jsonl", ".ndjson"))
    yield Source("parquet", _read_parquet, (".parquet",))
