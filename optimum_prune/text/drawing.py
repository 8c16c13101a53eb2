"""Token windows drawn from texts: at random to calibrate on, in order to evaluate on.

The documents are joined, tokenized once and cut into windows that do not overlap; each window begins with the
beginning-of-sequence token exactly where the tokenizer adds one. Windows for calibration are drawn with a seed. Choosing and
reporting never share text: windows for evaluation come from another text, or from the end of the same one.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from optimum_prune.errors import TextError
from optimum_prune.text.conversations import Conversation
from optimum_prune.text.source import Source, documents, parts_of
from optimum_prune.text.text import (
    LENGTH,
    SAMPLES,
    WIKITEXT,
    Text,
    Wanted,
    texts_to_use,
    window_counts,
    windows_wanted,
)
from optimum_prune.text.tokenization import tokenize
from optimum_prune.text.windows import Windows

if TYPE_CHECKING:
    from jaxtyping import Int
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)
CHARACTERS = 32 * 1024**2
"""No more of a text is read than this, or than the windows may need at `CHARACTERS_PER_TOKEN`."""
CHARACTERS_PER_TOKEN = 16
BETWEEN = "\n\n"
"""What is put between two documents."""
WIKITEXT_SIZE = 11_000_000
"""Characters of the text that is read if none is named; what others of the Hub have is not known without a network."""


@dataclass(frozen=True)
class Reader:
    """What reads texts for a model: its tokenizer, the sources of text, and how many tokens the model takes at once."""

    tokenizer: PreTrainedTokenizerBase
    sources: Mapping[str, Source]
    """By their names."""
    limit: int
    """No window may have more tokens."""

    @cached_property
    def bos(self) -> int | None:
        """The token that the tokenizer puts in front of a text, if it does."""
        first, token = self.tokenizer("a")["input_ids"][:1], self.tokenizer.bos_token_id
        return token if token is not None and first == [token] else None

    def body(self, length: int) -> int:
        """Tokens of text in a window of such a length."""
        return length - (self.bos is not None)

    def read(self, text: Text, characters: int) -> str:
        """The documents of a text, joined; otherwise as `read_and_tell`."""
        return self.read_and_tell(text, characters)[0]

    def read_and_tell(self, text: Text, characters: int) -> tuple[str, bool]:
        """The documents of a text, joined, and whether there are conversations among them.

        Args:
            characters: no more than so many of them.

        Raises:
            TextError: it cannot be read, or is empty.
        """
        parts, size, conversations = [], 0, False
        for part in self.pieces(text):
            conversations = conversations or isinstance(part, Conversation)
            parts.append(part if isinstance(part, str) else part.written(self.tokenizer))
            size += len(parts[-1])
            if size > characters:
                break
        joined = "".join(parts)[:characters]
        if not joined.strip():
            raise TextError(
                f"The text {text.describe()} is empty. Name one with enough text for a window of {text.length} tokens."
            )
        return joined, conversations

    def pieces(self, text: Text) -> Iterator[str | Conversation]:
        """The documents of a text, in order, with what is put between two; or conversations.

        Raises:
            TextError: it cannot be read.
        """
        between = ""
        for source, part in parts_of(text, self.sources):
            for number, document in enumerate(documents(source, part)):
                if isinstance(document, Conversation):
                    between = ""
                elif between and not (source.pieces and number):
                    yield between
                yield document
                between = "" if isinstance(document, Conversation) else BETWEEN

    def windows(self, tokens: Int[Tensor, " tokens"], text: Text) -> Int[Tensor, "windows length"]:
        """All the windows of a text, in order.

        Raises:
            TextError: there is not one.
        """
        length = text.length or LENGTH
        body = self.body(length)
        windows = tokens[: len(tokens) // body * body].view(-1, body)
        if not len(windows):
            raise TextError(
                f"The text {text.describe()} has {len(tokens)} tokens, too few for one window of {length}. Name a longer text, or ask for "
                f"shorter windows."
            )
        if self.bos is None:
            return windows
        return torch.cat([torch.full((len(windows), 1), self.bos), windows], dim=1)


@dataclass(frozen=True)
class Drawn:
    """Windows that were drawn from texts."""

    calibration: Windows
    evaluation: Windows | None
    """None if none are asked for."""
    text: Text
    """The one to calibrate on."""
    tokens: Int[Tensor, " tokens"]
    """Of that text, without those that are reported on."""
    conversations: bool
    """Whether that text holds conversations."""


def draw(calibration: Text, evaluation: Text, reader: Reader, seed: int) -> Drawn:
    """The windows to calibrate on and the windows to report on.

    Raises:
        TextError: a text that cannot be read, is empty, or is too short for one window.
        RecipeError: windows longer than the model can take.
    """
    calibration, evaluation = texts_to_use(calibration, evaluation)
    chosen, reported = window_counts(calibration, evaluation, reader.limit)
    calibration, evaluation = replace(calibration, length=chosen.length), replace(evaluation, length=reported.length)
    characters, other_characters = _characters_wanted(evaluation, chosen, reported)
    joined, conversations = reader.read_and_tell(calibration, characters)
    tokens = tokenize(joined, reader.tokenizer)
    if not reported.windows:
        windows = _draw_at_random(tokens, calibration, reader, seed)
        return Drawn(windows, None, calibration, tokens, conversations)
    if not evaluation.named:
        tokens, last = _keep_end_back(tokens, calibration, evaluation, reader)
        windows = _draw_at_random(tokens, calibration, reader, seed)
        return Drawn(windows, last, calibration, tokens, conversations)
    other = reader.read(evaluation, other_characters)
    if other == joined:
        raise TextError(
            f"{calibration.describe()} and {evaluation.describe()} hold the same text. What a model is chosen by must not be what "
            f"it is reported on: name another text, or none for windows from the end of the same one."
        )
    windows = _draw_at_random(tokens, calibration, reader, seed)
    reported_on = _first_windows(tokenize(other, reader.tokenizer), evaluation, reader)
    return Drawn(windows, reported_on, calibration, tokens, conversations)


def evaluation_windows(evaluation: Text, reader: Reader) -> Windows:
    """The first windows of a text, to report on; WikiText-2's test split if none is named.

    Raises:
        TextError: a text that cannot be read, is empty, or is too short for one window.
        RecipeError: windows longer than the model can take.
    """
    if not evaluation.named:
        evaluation = replace(evaluation, dataset=f"{WIKITEXT}:test")
    wanted = windows_wanted(evaluation, min(LENGTH, reader.limit), reader.limit)
    evaluation = replace(evaluation, length=wanted.length)
    joined = reader.read(evaluation, _characters(wanted.tokens))
    return _first_windows(tokenize(joined, reader.tokenizer), evaluation, reader)


# How much of a text is read


def characters_read(calibration: Text, evaluation: Text, limit: int) -> tuple[int, int]:
    """How many characters are read of the text to calibrate on and of the one to evaluate on, as far as the texts' names tell.

    Args:
        calibration: with the default filled in, as `texts_to_use` does.
        evaluation: likewise.
        limit: tokens that the model takes at once.

    Raises:
        RecipeError: windows longer than that.
    """
    most, of_other = _characters_wanted(evaluation, *window_counts(calibration, evaluation, limit))
    return min(_size(calibration), most), min(_size(evaluation), of_other)


def _characters_wanted(evaluation: Text, chosen: Wanted, reported: Wanted) -> tuple[int, int]:
    """No more characters are read of the text to calibrate on than the first of these, nor of another to evaluate on than the second."""
    if evaluation.named:
        return _characters(chosen.tokens), _characters(reported.tokens) if reported.windows else 0
    return _characters(chosen.tokens + reported.tokens), 0  # the windows to report on lie behind the others


def _characters(tokens: int) -> int:
    """No more characters than this are read for so many tokens."""
    return max(CHARACTERS, CHARACTERS_PER_TOKEN * tokens)


def _size(text: Text) -> int:
    """About how many characters a text has: the bytes of a file, or what is usual on the Hub."""
    if text.file is None:
        return WIKITEXT_SIZE
    return sum(file.stat().st_size for file in text.files or (text.file,))


# Which of a text's windows are taken


def _draw_at_random(tokens: Tensor, text: Text, reader: Reader, seed: int) -> Windows:
    windows = reader.windows(tokens, text)
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))
    chosen = windows[order[: _samples(text, windows)]]
    return Windows.from_tokens(chosen, text.describe(), reader.bos is not None)


def _first_windows(tokens: Tensor, text: Text, reader: Reader) -> Windows:
    windows = reader.windows(tokens, text)
    windows = windows[: _samples(text, windows)]
    return Windows.from_tokens(windows, text.describe(), reader.bos is not None)


def _samples(text: Text, windows: Tensor) -> int:
    """How many windows to take: as many as are asked for, or as there are; the latter is said if a number was asked for."""
    if text.samples is not None and text.samples > len(windows):
        logger.warning(
            "%d windows of %s are asked for, and its text has %d: all of them are used.",
            text.samples,
            text.describe(),
            len(windows),
        )
    return min(len(windows), SAMPLES if text.samples is None else text.samples)


def _keep_end_back(tokens: Tensor, calibration: Text, evaluation: Text, reader: Reader) -> tuple[Tensor, Windows]:
    """The tokens to calibrate on, and evaluation windows from behind them: at most half of the text unless more are asked for."""
    body, smallest = reader.body(evaluation.length or LENGTH), reader.body(calibration.length or LENGTH)
    wanted = evaluation.samples
    if wanted is None:
        wanted = max(1, min(SAMPLES, len(tokens) // 2 // body))
    if len(tokens) < wanted * body + smallest:
        raise TextError(
            f"The text {calibration.describe()} has {len(tokens)} tokens, too few to calibrate on one window of {calibration.length} and "
            f"to evaluate on {wanted} of {evaluation.length} behind it. Name a longer text or an evaluation text, or ask for fewer or "
            f"shorter windows."
        )
    start = len(tokens) - wanted * body
    end = replace(evaluation, text=calibration.text, dataset=calibration.dataset, samples=wanted)
    reported = _first_windows(tokens[start:], end, reader)
    return tokens[:start], replace(reported, source=f"the end of {calibration.describe()}")
