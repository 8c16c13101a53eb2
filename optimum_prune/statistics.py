"""What passes accumulate over tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Float


class Gram:
    """`X'X` of the activations at one place, summed over tokens, in float32 whatever the dtype of the activations.

    Products of two bfloat16 or float16 values are exact in float32, so only the sum is rounded.
    """

    def __init__(self, features: int, device: torch.device) -> None:
        self.value: Float[Tensor, "features features"] = torch.zeros(features, features, device=device)
        self.tokens = 0

    def add(self, activations: Float[Tensor, "tokens features"]) -> None:
        """Adds the outer products of these rows."""
        rows = activations.to(torch.float32)
        self.value.addmm_(rows.T, rows)
        self.tokens += len(rows)
