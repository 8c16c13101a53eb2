"""What it costs a model to make less of each of its layers, everything else as it is.

Each axis of a layer is narrowed to several sizes at once, on the stream of the dense model: the elimination comes by all of them. What the
predictions lose is then measured for one of these. Within a layer it is proportional to the relative error of the block's output, to about a
tenth, over sizes from a sixth to all; so one measurement and the errors tell the cost of every size. Layers that go are measured with what lies
in front of them refitted, attention that goes with nothing refitted.

The published search (Tyr-the-Pruner, arXiv 2503.09657) cuts on a stream that carries the expected errors of cuts in front. Here nothing that is
cut is used later but its size: the weights are fitted anew on the true stream. And costs measured apart were within a twentieth of what the
model lost with all of them.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from optimum_prune.anatomy.shape import ATTENTION, BLOCKS, FEED_FORWARD, LayerShape, Shape
from optimum_prune.anatomy.workload import Cost, Workload
from optimum_prune.refit.bridging import BRIDGING, bridged
from optimum_prune.refit.reconstruction import refitting_cost
from optimum_prune.selection.allowed import Allowed
from optimum_prune.selection.divergence import Divergence, trial_cost
from optimum_prune.selection.mixtures import AXIS as WHOLE
from optimum_prune.selection.mixtures import best_members, seeing_cost
from optimum_prune.selection.options import Curve, Prices
from optimum_prune.surgery.cuts import Cuts, Decision
from optimum_prune.surgery.norms import idle_norms
from optimum_prune.surgery.operation import changed_layer

if TYPE_CHECKING:
    from torch import nn

    from optimum_prune.anatomy.decoder import Decoder
    from optimum_prune.calibration.calibration import Calibration
    from optimum_prune.calibration.visit import LayerVisit
    from optimum_prune.refit.narrowing import Narrowing

STRIDE = 4
"""Predictions are compared at every fourth token: rather more windows than more of each."""


def priced(
    decoder: Decoder, fitted: Calibration, held_out: Calibration, allowed: Allowed, narrowing: Narrowing
) -> list[Prices]:
    """The prices of every layer of a model, which stays as it is.

    Args:
        fitted: the windows that are fitted to.
        held_out: those that costs are measured on.
    """
    divergence = Divergence(decoder, held_out, STRIDE)
    shapes, found = decoder.shape().layers, []
    visits = fitted.walk(decoder, "What cutting each layer costs")
    probes = held_out.quiet().walk(decoder, "")
    for visit, probe in zip(visits, probes, strict=True):
        pricing = _Pricing(decoder, visit, probe, allowed, narrowing)
        found.append(fitted.once(f"prices of layer {visit.index}", partial(pricing.found, divergence)))
    return [
        _prices(index, shape, allowed, found[index], found[index - 1] if index else {})
        for index, shape in enumerate(shapes)
    ]


def _prices(index: int, shape: LayerShape, allowed: Allowed, own: Any, in_front: Any) -> Prices:
    """The prices of a layer from what was found at it, and in front of it."""
    curves = {name: Curve(tuple(sizes), tuple(errors), price) for name, (sizes, errors, price) in own["axes"].items()}
    blocks = {block: (cost, count) for block, (cost, count) in own["blocks"].items()}
    whole = in_front.get("behind") if allowed.may_go(index) else None
    return Prices(shape, curves, allowed.sizes(index, shape), blocks, whole)


@dataclass(frozen=True)
class _Pricing:
    """A layer of the dense model that is priced."""

    decoder: Decoder
    visit: LayerVisit
    probe: LayerVisit
    allowed: Allowed
    narrowing: Narrowing

    def found(self, divergence: Divergence) -> dict[str, Any]:
        """Plain data: of each axis its sizes, their errors, and the price of an error; of each block, and of the layer behind, the cost."""
        curves, without, behind = dict(self._narrowed()), dict(self._without_blocks()), self._without_next()
        trials = {
            ("axis", name, place): (decision, 0)
            for name, decisions in curves.items()
            for place, decision in enumerate(self._measured(name, decisions))
        }
        trials |= {("without", block, 0): (decision, 0) for block, decision in without.items()}
        trials |= {} if behind is None else {("behind", "", 0): (behind, 1)}
        costs = dict(zip(trials, self._costs(divergence, trials.values()), strict=True))
        return {
            "axes": {
                name: self._curve(
                    name, each, [cost for (kind, of, _), cost in costs.items() if (kind, of) == ("axis", name)]
                )
                for name, each in curves.items()
            },
            "blocks": {block: [costs["without", block, 0], self._parameters(each)] for block, each in without.items()},
            "behind": costs.get(("behind", "", 0)),
        }

    def _costs(self, divergence: Divergence, trials: Collection[tuple[Decision, int]]) -> list[float]:
        """What decisions cost, each with so many layers behind gone as well; no less than nothing."""
        if not trials:
            return []
        decisions, skipped = zip(*trials, strict=True)
        costs = divergence.of(self.probe, decisions, skipped)
        return [max(cost, 0.0) if math.isfinite(cost) else math.inf for cost in costs]

    @property
    def _sizes(self) -> dict[str, list[int]]:
        """Of each axis, from many to few."""
        return self.allowed.seen(self.visit.index, self.visit.layer.shape())

    def _narrowed(self) -> Iterator[tuple[str, list[Decision]]]:
        """Each axis, and how it is narrowed to each size, from many to few."""
        for name, sizes in self._sizes.items():
            if name == WHOLE:
                yield name, best_members(self.visit, sizes, self.narrowing.score)
            else:
                yield name, self.narrowing.decisions(self.visit, name, sizes)

    def _measured(self, name: str, decisions: Sequence[Decision]) -> Sequence[Decision]:
        """Those of some sizes whose cost is measured: one, if their errors tell the cost of the others."""
        return decisions if name == WHOLE else [decisions[len(decisions) // 2]]

    def _curve(self, name: str, decisions: Sequence[Decision], costs: Sequence[float]) -> list[Any]:
        """The sizes of an axis, from few to all, their errors, and the price of an error; or their costs, and a price of 1."""
        units, sizes = self.visit.layer.axes[name].units, self._sizes[name]
        errors, price = costs, 1.0
        if name != WHOLE:
            errors = [_error(decision) for decision in decisions]
            price = costs[0] / max(errors[len(errors) // 2], 1e-12)
        return [[*reversed(sizes), units], [*reversed(errors), 0.0], price]

    def _without_blocks(self) -> Iterator[tuple[str, Decision]]:
        """Attention, if it may go, and the layer without it as it is.

        An FFN keeps some of its units: without it a layer loses two to thirty times of what it loses with the last sixth of them.
        """
        if self.allowed.may_lack_attention(self.visit.index) and self.visit.layer.blocks == BLOCKS:
            yield ATTENTION, Decision(Cuts(blocks={self.visit.index: (FEED_FORWARD,)}))

    def _parameters(self, decision: Decision) -> int:
        """How many go with what a decision leaves out: norms may, too."""
        layer = self.visit.layer
        left = replace(layer, module=changed_layer(self.decoder, decision, self.visit.index))
        idle = (left.module.get_submodule(name) for name in idle_norms(left))
        return _count(layer.module) - _count(left.module) + sum(map(_count, idle))

    def _without_next(self) -> Decision | None:
        """How the layer is that bridges the gap that the one behind it leaves; None if that may not go."""
        behind = self.visit.index + 1
        if behind >= len(self.decoder) or not self.allowed.may_go(behind):
            return None
        gap = range(behind, behind + 1)
        return Decision(weights=bridged(self.decoder, self.visit, gap, BRIDGING))


def _count(module: nn.Module) -> int:
    return sum(each.numel() for each in module.parameters())


def _error(decision: Decision) -> float:
    """The relative error of a block's output once it is narrowed; of experts, that of all on average."""
    error = decision.evidence["relative_error"]
    return float(sum(error) / len(error)) if isinstance(error, list) else float(error)


def prices_told(prices: Sequence[Prices], shape: Shape) -> dict[str, Any]:
    """The prices, as evidence."""
    found = {}
    for index, each in enumerate(prices):
        axes = {
            shape.layers[index].axis_named(name).size: {size: curve.at(size) for size in reversed(curve.sizes)}
            for name, curve in each.curves.items()
        }
        blocks = {f"without {block}": cost for block, (cost, _) in each.blocks.items()}
        found[index] = {**axes, **blocks, **({} if each.whole is None else {"gone": each.whole})}
    return {"nats_per_token_alone": found}


def pricing_cost(fitted: Workload, few: Workload, shape: Shape, allowed: Allowed, narrowing: Narrowing) -> Cost:
    """What `priced` takes.

    Args:
        fitted: the workload of the windows that are fitted to.
        few: that of those that costs are measured on.
    """
    costs = []
    for index, layer in enumerate(shape.layers):
        decisions = [
            (seeing_cost(fitted, layer), len(sizes))
            if name == WHOLE
            else (narrowing.cost(fitted, layer, layer.narrowed({name: sizes[-1]})), 1)
            for name, sizes in allowed.seen(index, layer).items()
        ]
        decisions += [(refitting_cost(fitted, layer, FEED_FORWARD), 1)] if allowed.may_go(index + 1) else []
        decisions += [(Cost(), 1)] if allowed.may_lack_attention(index) else []
        costs.append(trial_cost(fitted, few, shape, index, decisions))
    return Cost().followed_by(*costs).with_memory(fitted.stored_states() + few.states(6))
