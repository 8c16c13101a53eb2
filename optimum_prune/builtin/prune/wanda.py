"""Wanda: weights become zero by their magnitude times the norm of their inputs (Sun et al., ICLR 2024, arXiv 2306.11695).

The score of a weight is `|W_ij| ||X_j||`, with X the inputs of the matrix over the calibration tokens; the lowest of each row go, or,
with a pattern, the lowest of so many consecutive inputs of a row. Layer by layer, all linear modules at once: what reaches them is
seen in one run of the layer as it is, and the next layer sees what it puts out without them. Experts have the tokens that are routed
to them. Embeddings, norms, biases, routers and the output head stay. Nothing is refitted, and no shape changes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch

from optimum_prune.anatomy.shape import Shape
from optimum_prune.anatomy.workload import Cost, Workload
from optimum_prune.calibration.statistics import SquaredNorms
from optimum_prune.errors import RecipeError
from optimum_prune.hooks.marker import hookimpl
from optimum_prune.options import option
from optimum_prune.passes.base import Pass
from optimum_prune.passes.prune import PrunePass
from optimum_prune.refit.sparsifying import REMARK, Sparsifying, sparsifying_cost
from optimum_prune.selection.sparsity import Sparsity
from optimum_prune.selection.targets import check_named_once, check_protected

if TYPE_CHECKING:
    from torch import Tensor

    from optimum_prune.anatomy.decoder import Decoder
    from optimum_prune.calibration.calibration import Calibration
    from optimum_prune.surgery.cuts import Decision


@dataclass(frozen=True, kw_only=True)
class Wanda(PrunePass):
    """Sets the weights to zero that are the smallest next to the norms of their inputs; no shape changes."""

    name: ClassVar[str] = "wanda"
    sparsifies: ClassVar[bool] = True
    ratio: float | None = option("Fraction of the weights that become zero, between 0 and 1.", None, above=0, below=1)
    pattern: str | None = option(
        "Of how many consecutive inputs of a row how many weights stay, instead of 'ratio': 2:4 or 4:8.", None
    )
    share: Literal["count", "mass"] = option(
        "As many weights of each row, or those that carry the same share of a row's scores together.", "count"
    )
    protect: tuple[int, ...] = option("Layers to leave as they are.", ())

    def __post_init__(self) -> None:
        super().__post_init__()
        _ = self._sparsity
        if self.share == "mass" and self.pattern is not None:
            raise RecipeError(
                "wanda has a pattern, which leaves no choice of how many of a row go. Leave 'share' out."
            )
        check_named_once(self.name, self.protect)

    @property
    def _sparsity(self) -> Sparsity:
        return Sparsity.asked(self.name, self.ratio, self.pattern)

    def foresee(self, shape: Shape) -> Shape:
        check_protected(self.name, self.protect, shape)
        self._sparsity.check(self.name, shape)
        if self.share == "count":
            self._sparsity.check_rows(self.name, shape)
        return shape

    def remark(self, _: Shape) -> str:
        return REMARK

    def estimate(self, shape: Shape, work: Workload) -> Cost:
        return sparsifying_cost(shape, work, self.protect)

    def decide(self, decoder: Decoder, calibration: Calibration) -> Iterator[Decision]:
        sparsifying = Sparsifying(self.name, self._sparsity, self.protect, SquaredNorms, self._sparse)
        yield from sparsifying.decisions(decoder, calibration, "Wanda, layer by layer")

    def _sparse(self, weights: Sequence[Tensor], inputs: SquaredNorms) -> list[Tensor]:
        norms = inputs.value.sqrt().float()
        if not norms.any():  # no token reached it, as may be with one of many in a mixture: by magnitude alone
            norms = torch.ones_like(norms)
        return [self._without_lowest(weight, norms.to(weight.device)) for weight in weights]

    def _without_lowest(self, weight: Tensor, norms: Tensor) -> Tensor:
        scores = weight.float().abs() * norms
        gone = self._sparsity.lowest(scores) if self.share == "count" else self._sparsity.lowest_by_mass(scores)
        return weight.masked_fill(gone, 0)


@hookimpl
def passes() -> Iterator[type[Pass]]:
    yield Wanda
