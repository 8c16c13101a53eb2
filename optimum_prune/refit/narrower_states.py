"""The hidden states of a whole model made narrower, as one decision: on what they are projected, and what becomes of all weights."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Literal

from optimum_prune.anatomy.shape import Shape
from optimum_prune.anatomy.workload import Cost, Workload
from optimum_prune.calibration.stream import walk_cost
from optimum_prune.errors import RecipeError
from optimum_prune.refit.hidden import Projecting
from optimum_prune.refit.principal import energies, obstacle_to_rotation, principal_directions
from optimum_prune.refit.projecting import Basis
from optimum_prune.surgery.cuts import Cuts, Decision

if TYPE_CHECKING:
    from torch import Tensor

    from optimum_prune.anatomy.axis import Axis
    from optimum_prune.anatomy.decoder import Decoder
    from optimum_prune.calibration.calibration import Calibration

RUNS = 12
"""How often, about, a layer runs, as it was or projected."""


@dataclass(frozen=True)
class NarrowerStates:
    """How hidden states become narrower, and how what reads or writes them is refitted."""

    step: str
    """The pass that asks."""
    keep: Literal["energy", "directions"] | None = None
    """The features of the highest energy, or, after a rotation, the principal directions; if None, these where the model can be rotated."""
    damping: float = 0.1
    correction: float = 0.5
    refit: bool = True

    def decision(self, decoder: Decoder, calibration: Calibration, size: int) -> Decision:
        """How so many features are left of them; the model stays as it is.

        Raises:
            RecipeError: directions are to be kept of a model that cannot be rotated.
        """
        axis = decoder.hidden()
        assert axis is not None, "a plan refuses a model without one"
        matrix, kept, rotates = calibration.once("basis", partial(self._basis, decoder, calibration, axis, size))
        projecting = Projecting(Basis(matrix, rotates), self.damping, self.correction, self.refit)
        weights = projecting.weights(decoder, axis, calibration)
        evidence = {"hidden_size": size, "keep": "directions" if rotates else "energy"}
        return Decision(Cuts.along("hidden", {None: tuple(kept)}), weights, evidence)

    def _basis(
        self, decoder: Decoder, calibration: Calibration, axis: Axis, size: int
    ) -> tuple[Tensor, tuple[int, ...], bool]:
        """What hidden states are projected on; which of their features this is, or the first if it is none; and whether it is none."""
        why_not = "" if self.keep == "energy" else obstacle_to_rotation(decoder, calibration, axis)
        if self.keep == "directions" and why_not:
            raise RecipeError(f"{self.step} has keep 'directions', and {why_not}. Leave 'keep' out.")
        if self.keep != "energy" and not why_not:
            return principal_directions(decoder, calibration, axis)[:, :size].contiguous(), tuple(range(size)), True
        best = energies(decoder, calibration, axis).sort(descending=True, stable=True).indices[:size].sort().values
        kept = tuple(best.tolist())
        return Basis.of_features(kept, axis.units).matrix, kept, False

    def cost(self, work: Workload, shape: Shape) -> Cost:
        """What it takes."""
        again = [work.run(layer, work.tokens, RUNS if self.refit else 5) for layer in shape.layers]
        grams = 3 * 8 * work.hidden**2 * 3
        new = shape.parameters * work.itemsize
        cost = walk_cost(work, shape, streams=2).followed_by(*again)
        return cost.with_memory(grams + new + work.stored_states(3)).followed_by(Cost(left=new))
