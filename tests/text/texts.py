"""Texts in files of every kind, and windows of them."""

from __future__ import annotations

import json

import pyarrow
import pyarrow.parquet
import tiny

from optimum_prune import Text
from optimum_prune.text.drawing import Reader, draw

LENGTH, LIMIT = 16, 128
DOCUMENTS = ["Gou fanfan ki vinoulis ku lis.", "Tis tis ne se gowo.", tiny.text(400), tiny.text(300, seed=2)]


def write(folder, suffix, documents=DOCUMENTS, column="text", name="corpus"):
    file = folder / f"{name}{suffix}"
    if suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.table({"number": range(len(documents)), column: documents}), file)
    elif suffix == ".jsonl":
        file.write_text(
            "\n".join(json.dumps({column: document, "number": 1}) for document in documents), encoding="utf-8"
        )
    else:
        file.write_text("\n\n".join(documents), encoding="utf-8")
    return file


def windows_of(calibration, tokenizer, sources, evaluation=None, seed=0, **options):
    text = Text(text=str(calibration), length=LENGTH, **options)
    drawn = draw(text, evaluation or Text(samples=0), Reader(tokenizer, sources, LIMIT), seed)
    return drawn.calibration, drawn.evaluation
