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
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, ClassVar, Literal

from optimum_prune.anatomy.axis import Axis
from optimum_prune.anatomy.shape import AxisShape, Shape
from optimum_prune.anatomy.workload import Cost, Workload
from optimum_prune.calibration.stream import walk_cost
from optimum_prune.errors import RecipeError
from optimum_prune.hooks.marker import hookimpl
from optimum_prune.options import option
from optimum_prune.passes.base import Pass
from optimum_prune.passes.prune import PrunePass
from optimum_prune.refit.hidden import Projecting
from optimum_prune.refit.principal import energies, obstacle_to_rotation, principal_directions
from optimum_prune.refit.projecting import Basis
from optimum_prune.selection.targets import check_size, hidden_axis, sizes_of
from optimum_prune.surgery.cuts import Cuts, Decision

if TYPE_CHECKING:
    from torch import Tensor

    from optimum_prune.anatomy.decoder import Decoder
    from optimum_prune.calibration.calibration import Calibration

RUNS = 12
"""How often, about, a layer runs, as it was or projected."""


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

    def estimate(self, shape: Shape, work: Workload) -> Cost:
        again = [work.run(layer, work.tokens, RUNS if self.refit else 5) for layer in shape.layers]
        grams = 3 * 8 * work.hidden**2 * 3
        new = shape.parameters * work.itemsize
        cost = walk_cost(work, shape, streams=2).followed_by(*again)
        return cost.with_memory(grams + new + work.stored_states(3)).followed_by(Cost(left=new))

    def decide(self, decoder: Decoder, calibration: Calibration) -> Iterator[Decision]:
        axis = decoder.hidden()
        assert axis is not None, "foresee refuses a model without one"
        size = self.foresee(decoder.shape()).rest.units("hidden")
        matrix, kept, rotates = calibration.once("basis", partial(self._basis, decoder, calibration, axis, size))
        projecting = Projecting(Basis(matrix, rotates), self.damping, self.correction, self.refit)
        weights = projecting.weights(decoder, axis, calibration)
        evidence = {"hidden_size": size, "keep": "directions" if rotates else "energy"}
        yield Decision(Cuts.along("hidden", {None: tuple(kept)}), weights, evidence)

    def _basis(
        self, decoder: Decoder, calibration: Calibration, axis: Axis, size: int
    ) -> tuple[Tensor, tuple[int, ...], bool]:
        """What hidden states are projected on; which of their features this is, or the first if it is none; and whether it is none."""
        why_not = "" if self.keep == "energy" else obstacle_to_rotation(decoder, calibration, axis)
        if self.keep == "directions" and why_not:
            raise RecipeError(f"hidden has keep 'directions', and {why_not}. Leave 'keep' out.")
        if self.keep != "energy" and not why_not:
            return principal_directions(decoder, calibration, axis)[:, :size].contiguous(), tuple(range(size)), True
        best = energies(decoder, calibration, axis).sort(descending=True, stable=True).indices[:size].sort().values
        kept = tuple(best.tolist())
        return Basis.of_features(kept, axis.units).matrix, kept, False


@hookimpl
def passes() -> Iterator[type[Pass]]:
    yield HiddenPruner
