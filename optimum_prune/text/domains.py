"""Windows to train on, drawn from texts, and others of each that are held out."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from optimum_prune.errors import RecipeError, TextError
from optimum_prune.text.drawing import Reader
from optimum_prune.text.packed import packed
from optimum_prune.text.text import Text, windows_wanted
from optimum_prune.text.training import DomainText, Training
from optimum_prune.text.windows import Domain, Windows

if TYPE_CHECKING:
    from jaxtyping import Int
    from torch import Tensor

HELD_OUT, PART = 4096, 32
"""Tokens that are held out, over all domains, at most one for so many that are trained on; and at least one window of each."""
READ = 4
"""So many times the tokens that are trained on are read, to choose windows from."""


@dataclass(frozen=True)
class Chosen:
    """The text that passes choose by: what is trained on if no other text is named."""

    text: Text
    tokens: Int[Tensor, " tokens"]
    """Without those that are reported on."""
    length: int
    """Of its windows."""
    conversations: bool = False
    """Whether it holds conversations, of which all tokens are here, and not the answers alone."""


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
        title = self._title(text)
        domain = apart(title, self._windows(text, title), held_out)
        taught = domain.windows if text.samples is None else domain.windows.part(slice(text.samples))
        return replace(domain, windows=taught, weight=text.weight or 1.0, reference=text.reference)

    def _title(self, text: DomainText) -> str:
        """What a text is called."""
        return text.title if text.named or text.name else self.chosen.text.describe()

    def _windows(self, text: DomainText, title: str) -> Windows:
        """The windows of a text: of those tokens that are not reported on, if it is the one that passes choose by."""
        if not text.named or text.same_text_as(self.chosen.text):
            return self._chosen_windows(text, title)
        most = None if self.tokens is None else READ * (self.tokens + HELD_OUT)
        found = packed(self.reader, text, text.length or self.chosen.length, most, title)
        if not len(found):
            raise TextError(
                f"The training text {title} is too short for one window of {found.length} tokens. Name a longer text, or ask for shorter windows."
            )
        return found

    def _chosen_windows(self, text: DomainText, title: str) -> Windows:
        if self.chosen.conversations:
            raise TextError(
                f"The text {title} holds conversations, of which answers alone are trained on, and passes choose by it as it is. Name another text "
                f"under 'training', or another under 'calibration'."
            )
        tokens = self.reader.windows(self.chosen.tokens, text)
        return Windows.from_tokens(tokens, title, self.reader.bos is not None)


def apart(title: str, windows: Windows, held_out: int = HELD_OUT) -> Domain:
    """Windows as a domain, of which those at the end, with about so many tokens, are held out; a tenth at most, and one at least.

    Raises:
        TextError: there are too few.
    """
    kept_back = max(1, min(held_out // windows.length, len(windows) // 10))
    if len(windows) <= kept_back:
        raise TextError(
            f"The training text {title} has {len(windows)} windows of {windows.length} tokens, too few to train on some and to tell by "
            f"others how good the model is. Name a longer text, or ask for shorter windows."
        )
    end = len(windows) - kept_back
    return Domain(
        title, windows.part(slice(end)), replace(windows.part(slice(end, None)), source=f"the end of {title}")
    )
