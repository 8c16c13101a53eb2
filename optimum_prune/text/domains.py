"""Windows to train on, drawn from texts, and others of each that are held out."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from optimum_prune.errors import RecipeError, TextError
from optimum_prune.text.drawing import CHARACTERS_PER_TOKEN, Reader
from optimum_prune.text.text import Text, windows_wanted
from optimum_prune.text.tokenization import tokenize
from optimum_prune.text.training import DomainText, Training
from optimum_prune.text.windows import Domain, Windows

if TYPE_CHECKING:
    from jaxtyping import Int
    from torch import Tensor

HELD_OUT, PART = 4096, 16
"""Tokens that are held out, over all domains, at most one for so many that are trained on; and at least one window of each."""
MOST_CHARACTERS = 2**32
"""More of a text are not read."""


@dataclass(frozen=True)
class Chosen:
    """The text that passes choose by: what is trained on if no other text is named."""

    text: Text
    tokens: Int[Tensor, " tokens"]
    """Without those that are reported on."""
    length: int
    """Of its windows."""


@dataclass(frozen=True)
class TrainingReader:
    """What reads texts to train on."""

    reader: Reader
    chosen: Chosen
    tokens: int | None
    """How many will be trained on; None if nobody knows."""

    def domains(self, training: Training) -> tuple[Domain, ...]:
        """The windows of each domain.

        Raises:
            RecipeError: windows are longer than the model can take, or of several lengths.
            TextError: a text cannot be read, or is too short.
        """
        length = training.length or self.chosen.length
        texts = [
            replace(text, length=windows_wanted(text, length, self.reader.limit).length) for text in training.texts
        ]
        if len({text.length for text in texts}) > 1:
            raise RecipeError(
                "The domains of the training text have windows of several lengths. Give one 'length' for all."
            )
        held_out = HELD_OUT if self.tokens is None else min(HELD_OUT, self.tokens // PART)
        return tuple(self._domain(text, held_out // len(texts)) for text in texts)

    def _domain(self, text: DomainText, held_out: int) -> Domain:
        """A domain, of which about so many tokens are held out."""
        windows, title = self.reader.windows(self._tokens(text), text), self._title(text)
        apart = max(1, min(held_out // windows.shape[1], len(windows) // 10))
        if len(windows) <= apart:
            raise TextError(
                f"The training text {title} has {len(windows)} windows of {text.length} tokens, too few to train on some and to tell by "
                f"others how good the model is. Name a longer text, or ask for shorter windows."
            )
        taught = windows[: len(windows) - apart][: text.samples]
        bos = self.reader.bos is not None
        return Domain(
            title,
            Windows.from_tokens(taught, title, bos),
            Windows.from_tokens(windows[len(windows) - apart :], f"the end of {title}", bos),
            text.weight or 1.0,
            text.reference,
        )

    def _title(self, text: DomainText) -> str:
        """What a text is called."""
        return text.title if text.named or text.name else self.chosen.text.describe()

    def _tokens(self, text: DomainText) -> Tensor:
        """The tokens of a text: those that are not reported on, if it is the one that passes choose by."""
        if not text.named or text.same_text_as(self.chosen.text):
            return self.chosen.tokens
        characters = MOST_CHARACTERS if self.tokens is None else CHARACTERS_PER_TOKEN * (self.tokens + HELD_OUT)
        return tokenize(self.reader.read(text, characters), self.reader.tokenizer)
