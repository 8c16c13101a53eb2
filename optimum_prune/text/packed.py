"""Texts packed into windows to train on, piece by piece, so that no text is ever in memory whole; many tokens lie in a file."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from optimum_prune.errors import TextError
from optimum_prune.text.conversations import ANSWERS, Conversation
from optimum_prune.text.tokenization import PIECE, tokenize
from optimum_prune.text.windows import Windows

if TYPE_CHECKING:
    from jaxtyping import Bool, Int

    from optimum_prune.text.drawing import Reader
    from optimum_prune.text.text import Text

IN_MEMORY = 2**26
"""Tokens; more lie in a temporary file."""
FLUSHED = 2**20
"""Tokens that are gathered before they become windows."""
EVERY = torch.ones((), dtype=torch.bool)


def packed(reader: Reader, text: Text, length: int, most: int | None, title: str) -> Windows:
    """All windows of a text one after the other; of conversations, those in which there is an answer, whose tokens alone count.

    Args:
        length: tokens of a window.
        most: read no more tokens than about so many.
        title: what the text is called.

    Raises:
        TextError: it cannot be read, or its conversations have no answers.
    """
    rows = _Rows(length, reader.bos)
    for tokens, counted in _pieces(reader, text):
        rows.add(tokens, counted)
        if most is not None and rows.tokens >= most:
            break
    if rows.tokens and not rows.counted:
        raise TextError(
            f"The conversations of the training text {title} have no answers to train on: no message of the role '{ANSWERS}' that says anything. "
            f"Mend its rows, or name another text."
        )
    return rows.windows(title)


def _pieces(reader: Reader, text: Text) -> Iterator[tuple[Int[Tensor, " tokens"], Bool[Tensor, " tokens"] | None]]:
    """The tokens of a text, some at a time, and which of them count where not all do."""
    waiting = ""
    for piece in reader.pieces(text):
        if isinstance(piece, Conversation):
            yield piece.tokens(reader.tokenizer)
            continue
        waiting += piece
        while len(waiting) > PIECE:
            end = max(waiting.rfind("\n", 0, PIECE), waiting.rfind(" ", 0, PIECE), 0) or PIECE
            yield tokenize(waiting[:end], reader.tokenizer).int(), None
            waiting = waiting[end:]
    if waiting.strip():
        yield tokenize(waiting, reader.tokenizer).int(), None


class _Rows:
    """Tokens as they become windows, in memory as long as they are few.

    Args:
        bos: what each window begins with, if anything.
    """

    def __init__(self, length: int, bos: int | None) -> None:
        self.tokens = 0
        self.counted = False
        """Whether any of them count."""
        self._length = length
        self._bos = torch.tensor([] if bos is None else [bos], dtype=torch.int32)
        self._waiting: list[tuple[Tensor, Tensor]] = []
        self._gathered = 0
        self._rows: list[Tensor] = []
        self._counted: list[Tensor] = []
        self._all_count = True
        self._file: Path | None = None

    def add(self, tokens: Tensor, counted: Tensor | None) -> None:
        """Takes some more tokens, and which of them count."""
        self.tokens += len(tokens)
        self.counted = self.counted or counted is None or bool(counted.any())
        self._gathered += len(tokens)
        self._all_count = self._all_count and counted is None
        self._waiting.append((tokens, EVERY.expand(len(tokens)) if counted is None else counted))
        if self._gathered >= FLUSHED:
            self._flush()

    def windows(self, title: str) -> Windows:
        """All that is whole."""
        self._flush()
        tokens = self._all_rows()
        counted = None if self._all_count or not self._counted else torch.cat(self._counted)
        return Windows(tokens, EVERY.expand(tokens.shape), title, len(self._bos) > 0, counted)

    def _flush(self) -> None:
        """Makes windows of what waits, and lets the rest wait."""
        if not self._waiting:
            return
        body = self._length - len(self._bos)
        tokens, counted = (torch.cat(each) for each in zip(*self._waiting, strict=True))
        whole = len(tokens) // body * body
        self._waiting, self._gathered = [(tokens[whole:], counted[whole:])], len(tokens) - whole
        tokens, counted = tokens[:whole].view(-1, body), counted[:whole].view(-1, body)
        wanted = counted.any(1)
        tokens, counted = tokens[wanted], counted[wanted]
        self._rows.append(torch.cat([self._bos.expand(len(tokens), -1), tokens], 1))
        if not self._all_count:
            unpredicted = ~EVERY.expand(len(tokens), len(self._bos))
            self._counted.append(torch.cat([unpredicted, counted], 1))
        else:
            self._counted.append(EVERY.expand(len(tokens), self._length))
        if self._file is not None or sum(rows.numel() for rows in self._rows) > IN_MEMORY:
            self._write()

    def _write(self) -> None:
        """Moves windows from memory to a file."""
        if self._file is None:
            handle, name = tempfile.mkstemp(suffix=".tokens")
            os.close(handle)
            self._file = Path(name)
        with self._file.open("ab") as file:
            for rows in self._rows:
                file.write(rows.contiguous().numpy().data)
        self._rows = []

    def _all_rows(self) -> Tensor:
        if self._file is None:
            return torch.cat(self._rows) if self._rows else torch.zeros((0, self._length), dtype=torch.int32)
        self._write()
        count = self._file.stat().st_size // 4
        tokens = torch.from_file(str(self._file), shared=False, size=count, dtype=torch.int32)
        with suppress(OSError):  # what is mapped goes on being there, except where the system does not let it
            self._file.unlink()
        return tokens.view(-1, self._length)
