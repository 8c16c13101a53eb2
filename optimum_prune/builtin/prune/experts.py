"""Whole experts of a mixture leave: those that its output needs least, with the router's rows for them.

What tells that, and the papers, stand in `selection/mixtures.py`; layer by layer, on the stream of the layers already pruned.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, ClassVar, Literal

from optimum_prune.anatomy.shape import AxisShape, LayerShape, Shape
from optimum_prune.anatomy.workload import Cost, Workload
from optimum_prune.calibration.stream import walk_cost
from optimum_prune.errors import RecipeError
from optimum_prune.hooks.marker import hookimpl
from optimum_prune.options import option
from optimum_prune.passes.base import Pass
from optimum_prune.passes.prune import PrunePass
from optimum_prune.refit.allocating import Allocating
from optimum_prune.refit.narrowing import Narrowing
from optimum_prune.selection.allowed import Allowed
from optimum_prune.selection.mixtures import AXIS, best_members, seeing_cost
from optimum_prune.selection.targets import check_named_once, check_protected
from optimum_prune.surgery.cuts import NOTE, Decision

if TYPE_CHECKING:
    from optimum_prune.anatomy.decoder import Decoder
    from optimum_prune.calibration.calibration import Calibration
    from optimum_prune.calibration.visit import LayerVisit


DAMPING = 0.01
"""For a search that may narrow more than the number of experts; here that is all."""


@dataclass(frozen=True, kw_only=True)
class ExpertPruner(PrunePass):
    """Leaves out whole experts of mixtures, those whose output weighs least, and the router's rows for them."""

    name: ClassVar[str] = "experts"
    ratio: float | None = option(
        "Fraction of the experts of each layer to remove, between 0 and 1.", None, above=0, below=1
    )
    keep: int | None = option("The same, as how many of each layer stay.", None, at_least=1)
    score: Literal["reap", "frequency", "mean_output"] = option("What tells how much an expert matters.", "reap")
    allocation: Literal["uniform", "global"] = option(
        "As many from every layer, or from each those that hurt the model least: layers then differ.", "uniform"
    )
    protect: tuple[int, ...] = option("Layers to leave as they are.", ())

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.ratio is None) == (self.keep is None):
            raise RecipeError(
                "experts needs one of 'ratio', the fraction of the experts to remove, and 'keep', how many stay."
            )
        check_named_once(self.name, self.protect)

    # What there will be

    def foresee(self, shape: Shape) -> Shape:
        check_protected(self.name, self.protect, shape)
        mixed = [index for index, layer in enumerate(shape.layers) if layer.units(AXIS) and index not in self.protect]
        if not mixed:
            where = "none but protected layers has any" if self.protect else "no layer of this model has any"
            raise RecipeError(f"experts is to remove experts, and {where}. Use a pass for channels, heads or layers.")
        layers = (
            layer.narrowed({AXIS: self._kept(layer.axis_named(AXIS))}) if index in mixed else layer
            for index, layer in enumerate(shape.layers)
        )
        found = replace(shape, layers=tuple(layers))
        if self.allocation == "uniform":
            return found
        counts = [count for index in mixed for count in (*_axis(shape, index).fewer, _axis(shape, index).units)]
        return replace(found, searched={AXIS: math.gcd(*counts)})

    def _kept(self, axis: AxisShape) -> int:
        wanted = self.keep if self.keep is not None else round(axis.units * (1 - (self.ratio or 0)))
        if wanted in axis.fewer:
            return wanted
        few = axis.fewer
        step = "" if len(few) < 2 or few[1] - few[0] == 1 else f", by {few[1] - few[0]}"
        can = f"from {few[0]} to {few[-1]}{step} can be kept" if few else "none can be spared"
        asked = "" if self.keep is not None else f", by its ratio {self.ratio:g}"
        raise RecipeError(
            f"experts is to keep {wanted} of {axis.units} experts in each layer{asked}, and {can}, since each token goes through some of them. "
            f"Ask for another number."
        )

    def estimate(self, shape: Shape, work: Workload) -> Cost:
        pairs = list(zip(shape.layers, self.foresee(shape).layers, strict=True))
        seen = [seeing_cost(work, before) for before, after in pairs if before != after]
        walk = walk_cost(work, shape).followed_by(*(cost.with_memory(work.stored_states()) for cost in seen))
        if self.allocation == "uniform":
            return walk
        return self._allocating.cost(work, shape).followed_by(walk)

    @property
    def _allocating(self) -> Allocating:
        return Allocating(Allowed(self.name, (AXIS,), self.protect, fewest=0.0), Narrowing(DAMPING, score=self.score))

    # Deciding

    def decide(self, decoder: Decoder, calibration: Calibration) -> Iterator[Decision]:
        shape = decoder.shape()
        foreseen = self.foresee(shape)
        targets: Sequence[LayerShape] = foreseen.layers
        if self.allocation == "global":
            targets, evidence = self._allocating.found(decoder, calibration, shape.layers, foreseen.parameters)
            yield Decision(evidence=evidence)
        unseen = 0
        for visit in calibration.walk(decoder, "Experts, layer by layer"):
            keep = targets[visit.index].units(AXIS)
            if keep == shape.layers[visit.index].units(AXIS):
                continue
            decision = calibration.once(f"layer {visit.index}", partial(self._decision, visit, keep))
            unseen += list(decision.evidence["tokens"]).count(0)
            yield decision
        if unseen:
            yield Decision(
                evidence={
                    NOTE: f"no token was routed to {unseen} experts, which nothing is known of; more text tells more"
                }
            )

    def _decision(self, visit: LayerVisit, keep: int) -> Decision:
        (decision,) = best_members(visit, (keep,), self.score)
        return decision


def _axis(shape: Shape, index: int) -> AxisShape:
    return shape.layers[index].axis_named(AXIS)


@hookimpl
def passes() -> Iterator[type[Pass]]:
    yield ExpertPruner
