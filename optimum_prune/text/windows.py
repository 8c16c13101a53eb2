"""Token windows, and the share of them that each process takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from optimum_prune.errors import TextError, shown
from optimum_prune.machine.processes import rank, size

if TYPE_CHECKING:
    from jaxtyping import Bool, Int


@dataclass(frozen=True)
class Windows:
    """Token windows of one length."""

    tokens: Int[Tensor, "windows length"]
    mask: Bool[Tensor, "windows length"]
    """False where a token is padding, which no statistic and no loss counts."""
    source: str
    """Where the text is from."""
    bos: bool = False
    """Whether each window begins with the beginning-of-sequence token."""
    counted: Bool[Tensor, "windows length"] | None = None
    """Of which tokens the predictions count; if None, of all that are no padding."""

    @property
    def predicted(self) -> Bool[Tensor, "windows length"]:
        """Of which tokens the predictions count, the first of a window aside, which nothing predicts."""
        return self.mask if self.counted is None else self.counted

    @classmethod
    def from_tokens(
        cls, tokens: Int[Tensor, "windows length"], source: str = "given tokens", bos: bool = False
    ) -> Windows:
        """Windows without padding.

        Raises:
            TextError: the tokens are no tensor.
        """
        if not isinstance(tokens, Tensor):
            raise TextError(
                f"The tokens are given as {shown(tokens)}, which is no tensor. Give one, such as tokenizer(text, return_tensors='pt').input_ids."
            )
        return cls(tokens, torch.ones_like(tokens, dtype=torch.bool), source, bos)

    def check(self, longest: int) -> None:
        """Refuses what are no windows that a model can be run on.

        Args:
            longest: how many tokens it takes at once.

        Raises:
            TextError: they are none.
        """
        tokens, mask = self.tokens, self.mask
        flaw = ""
        if not isinstance(self.source, str):
            flaw = f"are from {shown(self.source)}, which is no text"
        elif not isinstance(tokens, Tensor) or tokens.is_meta or tokens.layout != torch.strided:
            flaw = "are no tensor that holds them one beside the other"
        elif tokens.ndim != 2 or tokens.dtype not in (torch.int64, torch.int32):
            flaw = "are no matrix of whole numbers, a row for each window"
        elif not isinstance(mask, Tensor) or mask.shape != tokens.shape or mask.dtype != torch.bool:
            flaw = "have a mask that does not say true or false of each token"
        elif len(tokens) == 0 or tokens.shape[1] < 2:
            flaw = f"are {len(tokens)} of {tokens.shape[1]} tokens, where there must be one at least, of two at least"
        elif tokens.shape[1] > longest:
            flaw = f"are of {tokens.shape[1]} tokens, and the model takes at most {longest}"
        elif int(tokens.min()) < 0:
            flaw = f"have the token {int(tokens.min())}, which no tokenizer has"
        elif not mask.any():
            flaw = "are nothing but padding"
        if flaw:
            raise TextError(
                f"The windows of tokens that are given {flaw}. Make them with Windows.from_tokens(tokens)."
            )

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def length(self) -> int:
        """Tokens of a window."""
        return self.tokens.shape[1]

    def part(self, rows: slice | Tensor, tokens: slice = slice(None)) -> Windows:
        """Some of the windows, and of each some of its tokens."""
        counted = None if self.counted is None else self.counted[rows, tokens]
        return replace(self, tokens=self.tokens[rows, tokens], mask=self.mask[rows, tokens], counted=counted)

    def parts(self, size: int) -> list[Windows]:
        """As many windows at a time as have about `size` tokens; at least one."""
        windows = max(1, size // self.length)
        return [self.part(slice(start, start + windows)) for start in range(0, len(self), windows)]

    def batches(self, size: int) -> list[tuple[Int[Tensor, "w length"], Bool[Tensor, "w length"]]]:
        """The same as tokens and masks."""
        return [(part.tokens, part.mask) for part in self.parts(size)]

    def share(self) -> Windows:
        """The windows that are for this process: one of so many as there are processes. None, if there are fewer windows."""
        return self if size() == 1 else self.part(slice(rank(), None, size()))

    def unpadded(self) -> Windows | None:
        """The windows without padding, which runtimes take; None if all have some."""
        whole = self.mask.all(dim=1)
        return self.part(whole) if whole.any() else None

    def describe(self, seed: int) -> dict[str, Any]:
        """Where they are from, how many and how long, for the report."""
        return {"text": self.source, "windows": len(self), "length": self.length, "bos": self.bos, "seed": seed}


def joined(some: Sequence[Windows]) -> Windows:
    """Windows of one length together."""
    first, sources = some[0], dict.fromkeys(each.source for each in some)
    tokens, mask, predicted = (
        torch.cat([getattr(each, name) for each in some]) for name in ("tokens", "mask", "predicted")
    )
    counted = None if all(each.counted is None for each in some) else predicted
    return replace(first, tokens=tokens, mask=mask, source=" and ".join(sources), counted=counted)


@dataclass(frozen=True)
class Domain:
    """A text to train on."""

    name: str
    windows: Windows
    held_out: Windows
    """Windows that are not trained on, to tell by them how good a model is."""
    weight: float = 1.0
    reference: float | None = None
    """The loss in nats that is to be reached, where that is given."""


@dataclass(frozen=True)
class Texts:
    """What passes choose by, and what is reported on."""

    calibration: Windows
    evaluation: Windows | None
    training: tuple[Domain, ...] = ()
    """What passes that train are trained on."""

    @property
    def taught(self) -> tuple[Windows, ...]:
        """The windows of all domains, those that are held out included."""
        return tuple(windows for domain in self.training for windows in (domain.windows, domain.held_out))

    def check(self, longest: int) -> None:
        """Refuses what are no windows that a model can be run on, as `Windows.check` does.

        Raises:
            TextError: they are none.
        """
        for windows in (self.calibration, self.evaluation, *self.taught):
            if isinstance(windows, Windows):
                windows.check(longest)
            elif windows is not None or self.calibration is None:
                raise TextError(
                    f"{shown(windows)} is given where windows of tokens should be. Make them with Windows.from_tokens(tokens)."
                )
