"""Tasks: questions with answers to choose from, as text on which it is measured what a model loses."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import chain, zip_longest
from typing import TYPE_CHECKING, Any

import torch

from optimum_prune.errors import TextError, printable, reason
from optimum_prune.machine import given_files
from optimum_prune.text.drawing import BETWEEN
from optimum_prune.text.tokenization import tokenize
from optimum_prune.text.windows import Windows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FORM = 'a line for each question, such as {"query": "Snow is", "choices": ["black", "white"], "gold": 1}'
"""What a file of tasks holds."""
SOURCE = "the tasks"
"""Where such windows are from."""


def check_task_files(names: Sequence[str]) -> None:
    """Refuses files that cannot be read, or do not begin with a question.

    Raises:
        TextError: one does not.
    """
    for name in names:
        if flaw := given_files.flaw(given_files.path_of(name)):
            raise TextError(f"The file of tasks {name or 'without a name'} {flaw}. Name a .jsonl file.")
        next(_answered(name))


def task_windows(
    names: Sequence[str], tokenizer: PreTrainedTokenizerBase, length: int, most: int, bos: int | None = None
) -> Windows:
    """Questions with their right answers, one of each file in turn, as windows; the last is padded.

    Args:
        length: tokens of a window.
        most: windows, at most.
        bos: the token that each window begins with, if they do.

    Raises:
        TextError: a file cannot be read, or holds something else.
    """
    in_turn = chain.from_iterable(zip_longest(*(list(_answered(name)) for name in names)))
    text = BETWEEN.join(each for each in in_turn if each is not None)
    body = length - (bos is not None)
    tokens = tokenize(text, tokenizer)[: most * body]
    padding = -len(tokens) % body
    rows, mask = (
        torch.cat([each, each.new_zeros(padding)]).view(-1, body) for each in (tokens, torch.ones_like(tokens).bool())
    )
    if bos is not None:
        rows = torch.cat([rows.new_full((len(rows), 1), bos), rows], dim=1)
        mask = torch.cat([mask[:, :1], mask], dim=1)
    return Windows(rows, mask, SOURCE, bos is not None)


def _answered(name: str) -> Iterator[str]:
    """Each question of a file with its right answer."""
    path = given_files.path_of(name)
    shown, found = printable(path.name), False
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield _question(line, f"Line {number} of the file of tasks {shown}")
                    found = True
    except (OSError, UnicodeDecodeError) as error:
        raise TextError(f"The file of tasks {shown} cannot be read: {reason(error)} Name another.") from error
    if not found:
        raise TextError(f"The file of tasks {shown} is empty. It is to hold {FORM}.")


def _question(line: str, where: str) -> str:
    """The question in a line, with its right answer.

    Raises:
        TextError: something else stands there.
    """
    try:
        return _with_answer(json.loads(line))
    except (ValueError, KeyError, IndexError, TypeError, RecursionError) as error:
        raise TextError(f"{where} is no question. The file is to hold {FORM}.") from error


def _with_answer(question: Any) -> str:
    """A question with its right answer."""
    query, choices, gold = question["query"], question["choices"], question["gold"]
    if not (isinstance(query, str) and isinstance(choices, list) and isinstance(gold, int) and gold >= 0):
        raise TypeError("something else stands there")
    if not (isinstance(choices[gold], str) and choices[gold].strip()):
        raise TypeError("an answer is no text")
    return f"{query} {choices[gold]}"
