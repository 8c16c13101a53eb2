"""How much to cut of which layer, for a budget of parameters.

What it costs the model to narrow one layer is measured for a few sizes, everything else dense, and costs of several layers are
taken to add up. They do so only roughly, since cuts interact; but they rank the layers as the model does, which the error of a
layer's own output does not.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING

import torch

from optimum_prune import distributed, layerwise, surgery
from optimum_prune.evaluation import Reference
from optimum_prune.shape import LayerShape

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from optimum_prune.anatomy import Family
    from optimum_prune.calibration import Calibration
    from optimum_prune.cuts import Decision
    from optimum_prune.layerwise import Visit

HELD_OUT = 4
"""Windows on which costs are measured, at most: nothing is fitted to them."""
LENGTH = 512
"""Tokens of such a window that are used, at most."""
STRIDE = 2
"""Predictions are compared at every second token: neighbours tell nearly the same, and the head is dear."""


def split(calibration: Calibration) -> tuple[Calibration, Calibration]:
    """Windows to fit to, and others to measure on; with a single window, it serves for both."""
    held_out = min(HELD_OUT, max(len(calibration.tokens) // 4, 1))
    fitted = slice(0, max(len(calibration.tokens) - held_out, 1))
    few = slice(len(calibration.tokens) - held_out, None)
    return (
        replace(calibration, tokens=calibration.tokens[fitted], mask=calibration.mask[fitted]),
        replace(calibration, tokens=calibration.tokens[few, :LENGTH], mask=calibration.mask[few, :LENGTH]),
    )


class Divergence:
    """What a change of one layer costs a model: how far its predictions then diverge from its own, in nats for each token."""

    @torch.no_grad()
    def __init__(self, model: PreTrainedModel, family: Family, windows: Calibration) -> None:
        self._model = model
        self._family = family
        self._layers = range(len(family.layers_of(model)))
        self._tokens = int(windows.mask[:, ::STRIDE].sum())
        self._ends = [
            layerwise.run_layers(model, family, batch, hidden, self._layers)
            for batch, hidden in layerwise.embed(model, family, windows)
        ]

    @torch.no_grad()
    def of(self, visit: Visit, decisions: Sequence[Decision]) -> list[float]:
        """What each decision about the visited layer would cost; nothing is changed."""
        totals = [0.0] * len(decisions)
        layers = [surgery.changed_layer(self._model, self._family, decision, visit.index) for decision in decisions]
        for (batch, hidden), end in zip(visit.stream, self._ends, strict=True):
            ends = [self._run(batch, layer, visit.index, hidden) for layer in layers]
            for pieces in zip(*(self._logits(batch, each) for each in (end, *ends)), strict=True):
                reference = Reference(pieces[0])
                totals = [total + reference.divergence(piece) for total, piece in zip(totals, pieces[1:], strict=True)]
        return [total / self._tokens for total in distributed.all_sums(totals)]

    def _logits(self, batch: layerwise.Batch, hidden: torch.Tensor) -> Iterator[torch.Tensor]:
        """Window by window, where tokens count."""
        for one, part in layerwise.Batch(batch.tokens[:, ::STRIDE], batch.mask[:, ::STRIDE], ()).split(
            hidden[:, ::STRIDE]
        ):
            yield layerwise.logits(self._model, self._family, one, part)[one.mask]

    def _run(self, batch: layerwise.Batch, layer: torch.nn.Module, index: int, hidden: torch.Tensor) -> torch.Tensor:
        behind = batch.run(layer, index, hidden)
        return layerwise.run_layers(self._model, self._family, batch, behind, self._layers[index + 1 :])


@dataclass(frozen=True)
class Measured:
    """What it costs to narrow one part of one layer, everything else dense."""

    field: str
    """The size of `LayerShape` that is narrowed: heads, width or expert_width."""
    costs: tuple[tuple[int, float], ...]
    """Sizes, from large to small, and their cost to the model, in any unit; the first is the size as it is, at no cost."""
    unit: int | None
    """Sizes are multiples of this, as those are that were measured; None if nothing between these is possible."""
    parameters: int
    """That go with one head or channel."""

    def steps(self) -> Iterator[tuple[float, int]]:
        """From large to small: what a step costs for each parameter it saves, and the size it leads to.

        Between what was measured, costs are straight lines; where the next line is less steep than the one before, both are
        one: so a step is never dearer than those behind it, and the cheapest first is best.
        """
        hull = [self.costs[0]]
        for size, cost in self.costs[1:]:
            while len(hull) > 1 and _slope(hull[-1], (size, cost)) < _slope(hull[-2], hull[-1]):
                hull.pop()
            hull.append((size, cost))
        for start, end in pairwise(hull):
            price = max(_slope(start, end), 0.0) / self.parameters
            if self.unit is None:
                yield price, end[0]
                continue
            for size in range((start[0] - 1) // self.unit * self.unit, end[0] - 1, -self.unit):
                yield price, size


def _slope(start: tuple[int, float], end: tuple[int, float]) -> float:
    """Cost of a head or channel between two sizes."""
    return (end[1] - start[1]) / (start[0] - end[0])


def allocate(layers: Sequence[LayerShape], measured: Sequence[Sequence[Measured]], budget: int) -> list[LayerShape]:
    """Narrows the layers until `budget` parameters are gone, or nearly: the step that costs least for each parameter first.

    Args:
        measured: of each layer, each part that may be narrowed.

    Returns:
        The layers' new shapes; what is gone differs from the budget by at most half of the smallest step, if enough may go.
    """
    shapes = list(layers)
    ladders = [_Ladder(index, part, list(part.steps())) for index, parts in enumerate(measured) for part in parts]
    while True:
        ladders = [ladder for ladder in ladders if ladder.steps]
        smallest = min((ladder.saves(shapes) for ladder in ladders), default=0)
        affordable = [ladder for ladder in ladders if ladder.saves(shapes) <= budget + smallest / 2]
        if not affordable:
            return shapes
        cheapest = min(affordable, key=lambda ladder: (ladder.steps[0][0], ladder.index))
        budget -= cheapest.saves(shapes)
        _, size = cheapest.steps.pop(0)
        shapes[cheapest.index] = shapes[cheapest.index].narrowed(**{cheapest.part.field: size})


@dataclass
class _Ladder:
    """The steps of a part of a layer that were not yet taken."""

    index: int
    part: Measured
    steps: list[tuple[float, int]]

    def saves(self, shapes: Sequence[LayerShape]) -> int:
        """Parameters that the next step saves."""
        size: int = getattr(shapes[self.index], self.part.field)
        return (size - self.steps[0][1]) * self.part.parameters
