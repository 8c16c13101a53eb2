"""How many weights of a matrix become zero, and which, by their scores: those that are compared with one another lie in one row."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from optimum_prune.errors import RecipeError

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from torch import Tensor

    from optimum_prune.anatomy.shape import LayerShape, Shape

MASS_FROM, MASS_TO, CLOSE = 0.0, 1.0, 1e-3
"""Between which shares of a row's scores the one is looked for that makes a matrix as sparse as wanted, and how nearly."""


@dataclass(frozen=True)
class Sparsity:
    """How many weights become zero."""

    ratio: float
    """Of each row; where there is a pattern, what it comes to."""
    stay: int = 0
    of: int = 0
    """Of so many consecutive inputs, `stay` stay; 0 where there is no pattern."""

    @classmethod
    def asked(cls, step: str, ratio: float | None, pattern: str | None) -> Sparsity:
        """From the options of a pass.

        Raises:
            RecipeError: neither is given, or both, or it is no pattern.
        """
        if (ratio is None) == (pattern is None):
            raise RecipeError(
                f"{step} needs one of 'ratio', the fraction of the weights that become zero, and 'pattern', such as 2:4."
            )
        if pattern is None:
            assert ratio is not None
            return cls(ratio)
        found = re.fullmatch(r"(\d{1,3}):(\d{1,3})", pattern)
        stay, of = map(int, found.groups()) if found else (0, 0)
        if not 0 < stay < of:
            raise RecipeError(
                f"{step} has the pattern '{pattern}'. Say how many weights stay of how many consecutive inputs, such as 2:4 or 4:8."
            )
        return cls(1 - stay / of, stay, of)

    def check(self, step: str, shape: Shape) -> None:
        """Refuses a pattern that does not go into the inputs of the matrices of a model.

        Raises:
            RecipeError: naming the size.
        """
        if not self.of:
            return
        for layer in shape.layers:
            for what, size in _row_lengths(layer).items():
                self.check_size(step, what.replace("_", "-"), size)

    def check_size(self, step: str, what: str, size: int) -> None:
        """Refuses a number of inputs that the pattern does not go into.

        Raises:
            RecipeError: naming it.
        """
        if self.of and size % self.of:
            raise RecipeError(
                f"{step} has the pattern {self.stay}:{self.of}, and the {what}, {size}, is no multiple of {self.of}. Give a ratio instead."
            )

    def check_rows(self, step: str, shape: Shape) -> None:
        """Refuses a ratio by which no row loses a weight.

        Raises:
            RecipeError: naming the longest row.
        """
        longest = max(max(_row_lengths(layer).values()) for layer in shape.layers)
        if int(longest * self.ratio) == 0:
            raise RecipeError(
                f"{step} has ratio {self.ratio:g}, by which no row of a matrix would lose one of its weights, of which there are {longest} at most. "
                f"Ask for more."
            )

    def lowest(self, scores: Float[Tensor, "out in"]) -> Bool[Tensor, "out in"]:
        """True where a weight goes: the lowest of each row, or of each `of` consecutive inputs of it."""
        if not self.of:
            return lowest_of_rows(scores, int(scores.shape[1] * self.ratio))
        groups = scores.view(len(scores), -1, self.of)
        return lowest_of_rows(groups, self.of - self.stay).flatten(1)

    def lowest_of_all(self, scores: Float[Tensor, "out some"]) -> Bool[Tensor, "out some"]:
        """The same, with all of the scores compared with one another where there is no pattern."""
        if self.of:
            return self.lowest(scores)
        return lowest_of_rows(scores.flatten(), int(scores.numel() * self.ratio)).view_as(scores)

    def lowest_by_mass(self, scores: Float[Tensor, "out in"]) -> Bool[Tensor, "out in"]:
        """True where a weight goes: of each row, the lowest that together have at most a share of its scores.

        The share is the same for all rows, and such that the matrix becomes as sparse as wanted; so rows whose scores are alike lose fewer.
        """
        ordered, order = scores.sort(dim=1, stable=True)
        mass = ordered.cumsum(1)
        low, high = MASS_FROM, MASS_TO
        share = (low + high) / 2
        gone = mass <= share * mass[:, -1:]
        while abs(reached := gone.float().mean().item() - self.ratio) > CLOSE and high - low > CLOSE**2:
            low, high = (low, share) if reached > 0 else (share, high)
            share = (low + high) / 2
            gone = mass <= share * mass[:, -1:]
        return torch.zeros_like(gone).scatter_(1, order, gone)


def _row_lengths(layer: LayerShape) -> dict[str, int]:
    """How many inputs the matrices of a layer have, by what these are."""
    widths = {f"width of the {block} block": layer.width(block) for block in layer.blocks}
    return {**widths, "hidden size": layer.units("hidden")}


def lowest_of_rows(scores: Float[Tensor, "... n"], counts: int | Int[Tensor, "... 1"]) -> Bool[Tensor, "... n"]:
    """True at the lowest of each row, so many of all or of each; of those that are alike, the first."""
    order = scores.argsort(dim=-1, stable=True)
    first = torch.arange(scores.shape[-1], device=scores.device) < counts
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, order, first.expand_as(order))
