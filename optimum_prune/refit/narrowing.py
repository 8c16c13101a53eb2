"""An axis of a layer narrowed: its units are eliminated, and the projection behind those that are kept is refitted."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, cast

from optimum_prune.anatomy.axis import Axis, Indices
from optimum_prune.anatomy.shape import ATTENTION, BLOCKS, AxisShape, LayerShape
from optimum_prune.anatomy.workload import Cost, Workload
from optimum_prune.calibration.statistics import Gram, gram_cost, gram_memory
from optimum_prune.calibration.visit import LayerVisit
from optimum_prune.refit.elimination import Elimination, elimination_cost, eliminations, group_eliminations, refit_on
from optimum_prune.refit.reconstruction import ProjectionTarget, fitting_cost, moved, named
from optimum_prune.surgery.cuts import Cuts, Decision

if TYPE_CHECKING:
    from torch import Tensor

    from optimum_prune.calibration.calibration import Calibration


@dataclass(frozen=True)
class Narrowing:
    """How units are chosen, and how the rest is refitted."""

    damping: float
    """Added to the gram's diagonal, relative to its mean."""
    correction: float = 0.0
    """How far the layer's output is moved towards the dense model's hidden states, where these are given."""
    step: int = 1
    """Units removed before the rest are ranked anew; 1 is the exact greedy."""
    swaps: int = 0
    """Pairs of a kept and a removed unit that may change places afterwards."""
    one_shot: bool = False
    """Whether units are ranked once instead of being eliminated."""
    score: str = "reap"
    """Of a mixture, what tells which members matter (`selection/mixtures.py`)."""

    def decisions(
        self, visit: LayerVisit, name: str, sizes: Sequence[int], reference: LayerVisit | None = None
    ) -> list[Decision]:
        """How each of some numbers of units of an axis would be reached.

        Args:
            sizes: from many to few.
            reference: the dense model's visit of the layer, already left, to move the layer's output towards.
        """
        axis = visit.layer.axes[name]
        followers = visit.layer.followers(axis)
        grams, *of_followers = visit.grams(axis, *followers)
        targets = self._targets(visit, axis, grams, reference)
        decided = self._decide(visit, axis, grams, targets, partial(self._eliminated, axis, sizes))
        for follower, its_grams in zip(followers, of_followers, strict=True):
            its_targets = self._targets(visit, follower, its_grams, None)
            choose = partial(self._eliminated, follower, [size * follower.times for size in sizes])
            others = self._decide(visit, follower, its_grams, its_targets, choose)
            decided = [_joined(*pair, follower) for pair in zip(decided, others, strict=True)]
        return decided

    def of_block(
        self,
        visit: LayerVisit,
        calibration: Calibration,
        block: str,
        shapes: tuple[LayerShape, LayerShape],
        reference: LayerVisit | None = None,
    ) -> Iterator[Decision]:
        """The decisions by which a block gets its size, each made once even if the run is killed and goes on.

        Args:
            shapes: of the layer before, and as it is to be.
            reference: as for `decisions`; then an output is moved towards it even where every unit stays.
        """
        before, after = shapes
        for axis in before.within(block):
            keep, towards = after.units(axis.name), None if axis.groups else reference
            if keep == axis.units and towards is None:
                continue
            decide = partial(self._decision, visit, axis.name, keep, towards)
            decision = calibration.once(f"{axis.size} of layer {visit.index}", decide)
            if not axis.groups:
                visit.narrow(visit.layer.axes[axis.name], cast("Indices", decision.cuts.kept(visit.index, axis.name)))
            yield decision

    def _decision(self, visit: LayerVisit, name: str, keep: int, reference: LayerVisit | None) -> Decision:
        (decision,) = self.decisions(visit, name, (keep,), reference)
        return decision

    def keeping(self, visit: LayerVisit, name: str, kept: Indices) -> Decision:
        """How these units of an axis, which were chosen elsewhere, are kept."""
        axis = visit.layer.axes[name]
        (grams,) = visit.grams(axis)

        def choose(gram: Gram, target: ProjectionTarget) -> list[Elimination]:
            return [refit_on(lambda: target.moments(gram, self.damping), target.weight, kept, axis.inputs(kept))]

        (decision,) = self._decide(visit, axis, grams, self._targets(visit, axis, grams, None), choose)
        return decision

    def _targets(
        self, visit: LayerVisit, axis: Axis, grams: Sequence[Gram], reference: LayerVisit | None
    ) -> list[ProjectionTarget]:
        """What the projections behind an axis are to come close to: themselves, moved towards the dense model's hidden states.

        What makes massive activations is not moved part of the way: fitted to those of some tokens, it fails on text where others have them.
        """
        projection = visit.layer.projection(axis.output)
        may_move = projection.linear is not None and axis.block == BLOCKS[-1]
        if reference is not None and may_move and not (self.correction < 1 and grams[0].massive):
            goal = (hidden for _, hidden in reference.stream)
            if target := moved(visit, axis, grams[0], goal, self.damping, self.correction):
                return [target]
        return [ProjectionTarget.of(projection, group) for group in range(len(projection.maps))]

    def _decide(
        self,
        visit: LayerVisit,
        axis: Axis,
        grams: Sequence[Gram],
        targets: Sequence[ProjectionTarget],
        choose: Callable[[Gram, ProjectionTarget], list[Elimination]],
    ) -> list[Decision]:
        """For each size that was asked for, what is kept in each group."""
        of_groups = []
        for group, (gram, target) in enumerate(zip(grams, targets, strict=True)):
            place = f"{axis.place.capitalize()} {group}" if axis.groups else f"The {axis.place}"
            with named(f"{place} of layer {visit.index}", target.weight, self.damping):
                of_groups.append(choose(gram, target))
        return [self._decided(visit, axis, grams, targets, results) for results in zip(*of_groups, strict=True)]

    def _decided(
        self,
        visit: LayerVisit,
        axis: Axis,
        grams: Sequence[Gram],
        targets: Sequence[ProjectionTarget],
        results: Sequence[Elimination],
    ) -> Decision:
        layer, several = visit.layer, axis.groups > 0
        bias = None if several else targets[0].bias_for(results[0], grams[0], axis.inputs(results[0].kept).tolist())
        stored = layer.projection(axis.output).stored([result.weight for result in results], bias)
        kept = tuple(result.kept for result in results)
        errors = [result.relative_error for result in results]
        evidence: dict[str, Any] = {
            "layer": visit.index,
            axis.size: len(results[0].kept),
            "relative_error": errors if several else errors[0],
        }
        if several:
            evidence["tokens"] = [gram.tokens for gram in grams]
        cuts = Cuts.along(axis.name, {visit.index: kept if several else kept[0]})
        return Decision(cuts, cast("dict[str, Tensor]", layer.named(stored)), evidence)

    def _eliminated(self, axis: Axis, sizes: Sequence[int], gram: Gram, target: ProjectionTarget) -> list[Elimination]:
        if axis.width > 1:
            return group_eliminations(target.moments(gram, self.damping), target.weight, sizes, axis.width)
        step = target.weight.shape[1] if self.one_shot else self.step
        return eliminations(lambda: target.moments(gram, self.damping), target.weight, sizes, step, self.swaps)

    def cost(self, work: Workload, before: LayerShape, after: LayerShape) -> Cost:
        """What it takes to narrow the axes of one layer, besides moving the hidden states through it."""
        axes = [axis for axis in before.axes if axis.inner and after.units(axis.name) < axis.units]
        attention = [axis.block for axis in axes if axis.block == ATTENTION]
        observed = work.observed(before, *attention)
        costs = [self._cost_along(work, axis, after.units(axis.name)) for axis in axes]
        left = sum(after.units(axis.name) * before.per_unit(axis.name) for axis in axes)
        cost = work.run(before, work.tokens).followed_by(*costs).with_memory(observed)
        return replace(cost, left=0.0 if work.offloaded else left * work.itemsize)

    def _cost_along(self, work: Workload, axis: AxisShape, keep: int) -> Cost:
        features, kept = axis.units * axis.width, keep * axis.width
        if axis.groups:
            found = elimination_cost(work, features, kept, one_shot=self.one_shot).times(axis.groups)
            summing = gram_cost(work, features, work.tokens * axis.active * axis.groups)
            return found.followed_by(summing).with_memory(work.in_memory(axis.groups * 4 * features**2))
        if axis.width > 1:
            found = elimination_cost(work, features, kept, one_shot=True)
        else:
            found = elimination_cost(work, features, kept, one_shot=self.one_shot, swaps=self.swaps)
        if self.correction and axis.block == BLOCKS[-1]:
            found = found.followed_by(fitting_cost(work, features))
        summing = gram_cost(work, features).with_memory(gram_memory(work, features))
        narrower = Cost(work.in_memory(work.tokens * kept * work.itemsize) + gram_memory(work, features))
        return found.followed_by(summing, narrower)


def _joined(decision: Decision, other: Decision, follower: Axis) -> Decision:
    """A decision with that of an axis that is cut with it."""
    return Decision(
        decision.cuts.merge(other.cuts),
        {**decision.weights, **other.weights},
        {**decision.evidence, f"{follower.name}_relative_error": other.evidence["relative_error"]},
    )
