"""Hidden size: the same features of the hidden states leave the whole model, or the directions in which they vary least.

- `energy`: the features stay whose values behind the norms are largest over the calibration tokens, over all layers (Minitron,
  Muralidharan et al., arXiv 2407.14679).
- `directions`: where norms divide by the root of the mean square, their weights are folded into the matrices behind them and the hidden
  states rotated, all by one rotation, which changes nothing; then the first principal directions stay (as SliceGPT, Ashkboos et al.,
  arXiv 2401.15024, which takes another rotation for each block, and pays for it with adapters).

Then norms are rescaled, and whatever reads or writes hidden states is refitted (`refit/hidden.py`). A stock checkpoint comes out.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, ClassVar, Literal

from optimum_prune.anatomy.shape import AxisShape, Shape
from optimum_prune.anatomy.workload import Cost, Workload
from optimum_prune.errors import RecipeError
from optimum_prune.hooks.marker import hookimpl
from optimum_prune.options import option
from optimum_prune.passes.base import Pass
from optimum_prune.passes.prune import PrunePass
from optimum_prune.refit.narrower_states import NarrowerStates
from optimum_prune.selection.targets import check_size, hidden_axis, sizes_of
from optimum_prune.surgery.cuts import Decision

if TYPE_CHECKING:
    from optimum_prune.anatomy.decoder import Decoder
    from optimum_prune.calibration.calibration import Calibration


@dataclass(frozen=True, kw_only=True)
class HiddenPruner(PrunePass):
    """Makes the hidden states of the whole model narrower, and refits every matrix that reads or writes them."""

    name: ClassVar[str] = "hidden"
    size: int | None = option("How many features stay.", None, at_least=1)
    ratio: float | None = option(
        "Fraction of the features to remove, between 0 and 1, instead.", None, above=0, below=1
    )
    params: float | None = option(
        "Fraction of all the model's parameters to keep, instead; the size is solved for.", None, above=0, below=1
    )
    keep: Literal["energy", "directions"] | None = option(
        "The features of the highest energy, or, after a rotation, the principal directions; if not given, these where the model can be "
        "rotated.",
        None,
    )
    refit: bool = option("Refit every matrix that reads or writes hidden states by least squares.", True)
    damping: float = option("Added to the gram's diagonal, relative to its mean.", 0.1, above=0, below=math.inf)
    correction: float = option(
        "How far what writes is moved towards the hidden states of the model as it was, 0 to 1.",
        0.5,
        at_least=0,
        at_most=1,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if sum(value is not None for value in (self.size, self.ratio, self.params)) != 1:
            raise RecipeError("hidden needs exactly one of 'size', 'ratio' and 'params'.")

    def foresee(self, shape: Shape) -> Shape:
        return shape.narrowed({"hidden": self._kept(hidden_axis(self.name, shape), shape)})

    def _kept(self, axis: AxisShape, shape: Shape) -> int:
        sizes = sizes_of(axis)
        if not sizes:
            raise RecipeError(
                f"hidden finds no smaller size than {axis.units} that the config of this architecture can say. Use another pass."
            )
        if self.size is not None:
            check_size(self.name, "size", self.size, axis)
            return self.size
        if self.ratio is not None:
            asked, share = f"ratio {self.ratio:g}", 1 - self.ratio
            measured = {count: count for count in (*sizes, axis.units)}
        else:
            assert self.params is not None
            asked, share = f"params {self.params:g}", self.params
            measured = {count: shape.narrowed({"hidden": count}).parameters for count in (*sizes, axis.units)}
        goal = share * measured[axis.units]
        found = min(sizes, key=lambda count: abs(measured[count] - goal))
        gap = max(later - before for before, later in pairwise(sorted(measured.values())))
        if abs(measured[found] - goal) > gap / 2:
            raise RecipeError(
                f"hidden has {asked}, and of {axis.units} features from {sizes[0]} to {sizes[-1]} can be kept. Choose another, or another pass."
            )
        return found

    @property
    def _how(self) -> NarrowerStates:
        return NarrowerStates(self.name, self.keep, self.damping, self.correction, self.refit)

    def estimate(self, shape: Shape, work: Workload) -> Cost:
        return self._how.cost(work, shape)

    def decide(self, decoder: Decoder, calibration: Calibration) -> Iterator[Decision]:
        size = self.foresee(decoder.shape()).rest.units("hidden")
        yield self._how.decision(decoder, calibration, size)


@hookimpl
def passes() -> Iterator[type[Pass]]:
    yield HiddenPruner
