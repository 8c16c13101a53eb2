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
from optimum_prune.selection.budget import allocate
from optimum_prune.selection.divergence import trial_cost, trial_workloads
from optimum_prune.selection.measuring import Trial, measure_layers, told
from optimum_prune.selection.mixtures import AXIS, best_members, seeing_cost
from optimum_prune.selection.targets import check_named_once, check_protected
from optimum_prune.surgery.cuts import NOTE, Decision

if TYPE_CHECKING:
    from optimum_prune.anatomy.decoder import Decoder
    from optimum_prune.calibration.calibration import Calibration
    from optimum_prune.calibration.visit import LayerVisit


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
        fitted, few = trial_workloads(work)
        trials = [
            trial_cost(
                fitted,
                few,
                shape,
                index,
                [(seeing_cost(fitted, pair[0]), len(trial.sizes)) for trial in self._trials(index, *pair)],
            )
            for index, pair in enumerate(pairs)
        ]
        return Cost().followed_by(*trials).with_memory(work.stored_states() + few.states(6)).followed_by(walk)

    # Deciding

    def decide(self, decoder: Decoder, calibration: Calibration) -> Iterator[Decision]:
        shape = decoder.shape()
        foreseen = self.foresee(shape)
        targets = foreseen.layers
        if self.allocation == "global":
            pairs = zip(shape.layers, foreseen.layers, strict=True)
            trials = {index: list(self._trials(index, *pair)) for index, pair in enumerate(pairs)}
            measured = measure_layers(decoder, calibration, trials, self._decisions)
            targets = tuple(allocate(shape.layers, measured, shape.parameters - foreseen.parameters))
            yield Decision(evidence=told(shape, measured))
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

    def _trials(self, index: int, layer: LayerShape, uniform: LayerShape) -> Iterator[Trial]:
        """At which numbers of experts a layer is measured: one in three steps from all to the fewest."""
        if index in self.protect or not layer.units(AXIS):
            return
        axis = layer.axis_named(AXIS)
        worth = [count for count in axis.fewer if count >= uniform.units(AXIS) / 2]
        sizes = {worth[0], worth[len(worth) // 2], uniform.units(AXIS)}
        yield Trial(axis, tuple(sorted(sizes, reverse=True)), math.gcd(*axis.fewer, axis.units))

    def _decision(self, visit: LayerVisit, keep: int) -> Decision:
        (decision,) = best_members(visit, (keep,), self.score)
        return decision

    def _decisions(self, visit: LayerVisit, _: str, counts: Sequence[int]) -> list[Decision]:
        return best_members(visit, counts, self.score)


def _axis(shape: Shape, index: int) -> AxisShape:
    return shape.layers[index].axis_named(AXIS)


@hookimpl
def passes() -> Iterator[type[Pass]]:
    yield ExpertPruner
