"""Linear maps, however a model stores them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from jaxtyping import Float


@dataclass(frozen=True)
class Linear:
    """A linear module as `y = W x + b`, whether it stores W, as `nn.Linear` does, or W', as GPT-2's `Conv1D` does."""

    module: nn.Module
    transposed: bool

    @property
    def weight(self) -> Tensor:
        """W, with shape (out, in): a view of the module's parameter."""
        stored = cast(Tensor, self.module.weight).detach()
        return stored.T if self.transposed else stored

    @property
    def bias(self) -> Tensor | None:
        """b, with shape (out,)."""
        stored = cast("Tensor | None", self.module.bias)
        return None if stored is None else stored.detach()

    def stored(self, weight: Tensor) -> Tensor:
        """A weight of shape (out, in) as the module stores it."""
        return weight.T.contiguous() if self.transposed else weight.contiguous()


@dataclass(frozen=True)
class Projection:
    """The parameter behind an axis, as one map `y = W x + b`, or, of experts in one tensor, as one for each of these."""

    name: str
    """The path of the parameter from its decoder layer."""
    maps: Sequence[Float[Tensor, "out in"]]
    """W of each."""
    bias: Float[Tensor, " out"] | None
    linear: Linear | None
    """The module behind it; None where several maps lie in one tensor."""

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        return self.maps[0].device

    @property
    def dtype(self) -> torch.dtype:
        """In what its weights are stored."""
        return self.maps[0].dtype

    def stored(self, maps: Sequence[Float[Tensor, "out in"]], bias: Float[Tensor, " out"] | None) -> dict[str, Tensor]:
        """New maps, and a bias where there is one, as the parameters that hold them, by their paths from the layer."""
        if self.linear is None:
            return {self.name: torch.stack(list(maps))}
        weights = {self.name: self.linear.stored(maps[0].to(self.dtype))}
        if bias is not None:
            weights[f"{self.name.removesuffix('weight')}bias"] = bias
        return weights
