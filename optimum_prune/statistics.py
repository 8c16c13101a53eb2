"""What passes accumulate over tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Float


BLOCK = 512
"""A gram is symmetric, so only the blocks on and above its diagonal are computed; smaller ones multiply more slowly."""


class Gram:
    """`X'X` of the activations at one place, summed over tokens, in float32 whatever the dtype of the activations.

    Products of two bfloat16 or float16 values are exact in float32, so only the sum is rounded.
    """

    def __init__(self, features: int, device: torch.device) -> None:
        self._upper = torch.zeros(features, features, device=device)  # what lies left of the diagonal blocks stays 0
        self._sum = torch.zeros(features, dtype=torch.float64, device=device)
        self.tokens = 0

    def add(self, activations: Float[Tensor, "tokens features"]) -> None:
        """Adds the outer products of these rows."""
        rows = activations.to(torch.float32)
        for start in range(0, rows.shape[1], BLOCK):
            columns = rows[:, start : start + BLOCK]
            self._upper[start : start + BLOCK, start:].addmm_(columns.T, rows[:, start:])
        self._sum += rows.sum(0)
        self.tokens += len(rows)

    @property
    def mean(self) -> Float[Tensor, " features"]:
        """The mean activation, float64; 0 if there was no token."""
        return self._sum / max(self.tokens, 1)

    @property
    def centered(self) -> Float[Tensor, "features features"]:
        """The gram of the activations less their mean, float64."""
        return self.value.double() - self.tokens * torch.outer(self.mean, self.mean)

    @property
    def value(self) -> Float[Tensor, "features features"]:
        """The gram so far."""
        return self._upper.triu() + self._upper.triu(1).T
