"""How much to cut of which layer, for a budget of parameters.

What it costs the model to narrow one layer is measured for a few sizes, everything else dense, and costs of several layers are
taken to add up. They do so only roughly, since cuts interact; but they rank the layers as the model does, which the error of a
layer's own output does not.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from optimum_prune.anatomy.shape import LayerShape


@dataclass(frozen=True)
class Measured:
    """What it costs to narrow one axis of one layer, everything else dense."""

    axis: str
    """The axis that is narrowed."""
    costs: tuple[tuple[int, float], ...]
    """Sizes, from large to small, and their cost to the model, in any unit; the first is the size as it is, at no cost."""
    unit: int | None
    """Sizes are multiples of this, as those are that were measured; None if nothing between these is possible."""
    parameters: int
    """That go with one unit."""

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
    """Cost of a unit between two sizes."""
    return (end[1] - start[1]) / (start[0] - end[0])


def allocate(layers: Sequence[LayerShape], measured: Sequence[Sequence[Measured]], budget: int) -> list[LayerShape]:
    """Narrows the layers until `budget` parameters are gone, or nearly: the step that costs least for each parameter first.

    Args:
        measured: of each layer, each axis that may be narrowed.

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
        shapes[cheapest.index] = shapes[cheapest.index].narrowed({cheapest.part.axis: size})


@dataclass
class _Ladder:
    """The steps along an axis of a layer that were not yet taken."""

    index: int
    part: Measured
    steps: list[tuple[float, int]]

    def saves(self, shapes: Sequence[LayerShape]) -> int:
        """Parameters that the next step saves."""
        return (shapes[self.index].units(self.part.axis) - self.steps[0][1]) * self.part.parameters
