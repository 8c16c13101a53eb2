"""Which models of a size there might be: each layer its own, or all alike, from what every layer costs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise, product

from optimum_prune.anatomy.shape import STATES, LayerShape, Shape
from optimum_prune.selection.measures import Measure, whole
from optimum_prune.selection.options import Option, Prices, chosen, filled, frontier, hull

Choice = tuple[LayerShape | None, ...]
"""Of each layer, what is left of it."""
Priced = tuple[Choice, float]
"""A choice, and its cost."""


@dataclass(frozen=True)
class PriceList:
    """What it costs to leave each layer of a model in whichever way, and what it has of what is to become less."""

    layers: Sequence[Prices]
    rest: LayerShape
    """What belongs to no layer."""
    measure: Measure

    def size(self, choice: Choice) -> float:
        """Of a whole model."""
        return whole(self.measure, choice, self.rest)

    def _options(self) -> list[list[Option]]:
        """Of each layer, the hull of the ways in which it may be left."""
        return [hull(self._ways(index, prices)) for index, prices in enumerate(self.layers)]

    def _ways(self, index: int, prices: Prices) -> Iterator[Option]:
        for shape, cost in prices.ways():
            if math.isfinite(cost):
                yield Option(shape, 0.0 if shape is None else self.measure.of(index, shape), cost)

    def frontier(self, least: float = 0.0) -> list[tuple[float, float]]:
        """Sizes of whole models, from all to the smallest, and what the best choice of each would cost if costs added up.

        Args:
            least: the smallest size that there may be.
        """
        rest = self.measure.of_rest(self.rest)
        found = ((size + rest, cost) for size, cost in frontier(self._options()))
        return list(dict.fromkeys(each for each in found if each[0] >= least))

    def kinds(self) -> list[PriceList]:
        """Of everything that may go, without whole layers, and of units alone."""
        without_layers = [replace(each, whole=None) for each in self.layers]
        units_alone = [replace(each, whole=None, blocks={}) for each in self.layers]
        return [self, replace(self, layers=without_layers), replace(self, layers=units_alone)]

    def within(self, size: float) -> list[Priced]:
        """The best choice of no more than a size, each layer its own; none if that is out of reach."""
        picked = self._picked(size)
        choice = tuple(option.shape for option in picked)
        found = [(choice, math.fsum(option.cost for option in picked))]
        return found if self.size(choice) <= size * (1 + 1e-3) else []

    def at_most(self, size: float) -> Choice:
        """The same; the smallest choice if that is out of reach."""
        return tuple(option.shape for option in self._picked(size))

    def _picked(self, size: float) -> list[Option]:
        room = size - self.measure.of_rest(self.rest)
        ways = [list(self._ways(index, prices)) for index, prices in enumerate(self.layers)]
        return filled(chosen([hull(each) for each in ways], room), ways, room)

    def with_states(self, size: int) -> PriceList:
        """Of the same model once its hidden states have so many features; what that costs is not among these prices."""
        states = {STATES: size}
        layers = [replace(each, shape=each.shape.narrowed(states)) for each in self.layers]
        return replace(self, layers=layers, rest=self.rest.narrowed(states))

    def even(self, size: float, most: int) -> list[Priced]:
        """The best choices of no more than a size in which all layers that stay are alike.

        For each number of layers that go, and each number of units of the axes but one, that one has as many units as fit. Of these, whatever
        leaves more room than another by a step of that axis is none.

        Args:
            most: of the choices.
        """
        first, widest = self.layers[0], self._widest
        sizes = {name: first.multiples[name] for name in first.curves if name != widest}
        found: dict[Choice, float] = {}
        for gone in range(len(self.layers) // 2 + 1):
            for units in product(*sizes.values()):
                fits = first.shape.narrowed(dict(zip(sizes, units, strict=True)))
                choice = self._even(gone, fits, widest, size)
                if choice is not None and math.isfinite(choice[1]):
                    found[choice[0]] = choice[1]
        largest = max(map(self.size, found), default=0.0)
        near = [(choice, cost) for choice, cost in found.items() if self.size(choice) >= largest - self.even_step]
        return sorted(near, key=cost_of)[:most]

    @property
    def _widest(self) -> str | None:
        """The axis of layers that are alike that has most sizes."""
        first = self.layers[0]
        return max(first.curves, key=lambda name: len(first.multiples[name]), default=None)

    @property
    def even_step(self) -> float:
        """By how much models differ at most whose layers, all alike, differ by one step of the axis that has most; 0 without any."""
        if (widest := self._widest) is None:
            return 0.0
        shape, sizes = self.layers[0].shape, self.layers[0].multiples[widest]
        each = [self._on_average(shape.narrowed({widest: size})) for size in sizes]
        return len(self.layers) * max(after - before for before, after in pairwise(each))

    def _even(self, gone: int, shape: LayerShape, widest: str | None, size: float) -> Priced | None:
        """The best choice with so many layers gone and the others left so, the widest axis narrowed until it fits; None if it never does."""
        shapes = [shape]
        if widest is not None:
            shapes = [shape.narrowed({widest: each}) for each in reversed(self.layers[0].multiples[widest])]
        stay, room = len(self.layers) - gone, (size - self.measure.of_rest(self.rest)) * (1 + 1e-9)
        fits = (each for each in shapes if stay * self._on_average(each) <= room)
        largest = next(fits, None)
        return None if largest is None else self._with_gone(gone, largest)

    def _on_average(self, shape: LayerShape) -> float:
        """The size of a layer that is left so."""
        return math.fsum(self.measure.of(index, shape) for index in range(len(self.layers))) / len(self.layers)

    def _with_gone(self, gone: int, shape: LayerShape) -> Priced | None:
        """The best choice with so many layers gone and the others left so; None if not so many may go."""
        costs = [_cost_as(each, shape) for each in self.layers]
        gains = sorted(
            (each.whole - cost, index)
            for index, (each, cost) in enumerate(zip(self.layers, costs, strict=True))
            if each.whole is not None
        )
        if len(gains) < gone:
            return None
        goes = {index for _, index in gains[:gone]}
        total = math.fsum(
            self.layers[index].whole or 0.0 if index in goes else cost for index, cost in enumerate(costs)
        )
        return tuple(None if index in goes else shape for index in range(len(self.layers))), total


def cost_of(choice: Priced) -> float:
    """By prices."""
    return choice[1]


def _cost_as(prices: Prices, shape: LayerShape) -> float:
    """What it costs to leave a layer so."""
    return math.fsum(
        prices.curves[axis.name].at(axis.units)
        for axis in shape.axes
        if axis.name in prices.curves and axis.units < prices.shape.units(axis.name)
    )


def states_of(choice: Choice) -> int:
    """How many features the hidden states have; 0 where the config cannot say another number."""
    return max((layer.units(STATES) for layer in choice if layer is not None), default=0)


def rest_of(choice: Choice, shape: Shape) -> LayerShape:
    """What belongs to no layer, of a model whose layers are left so."""
    return shape.rest.narrowed({STATES: states_of(choice)}) if states_of(choice) else shape.rest


def parameters_of(choice: Choice, shape: Shape) -> int:
    """Of the whole model."""
    return rest_of(choice, shape).parameters + sum(layer.parameters for layer in choice if layer is not None)


def sizes_told(choice: Choice, shape: Shape) -> Iterator[str]:
    """What is less of each layer, as text: `12: width 768`, `15: gone`, `7: without attention`."""
    for index, (after, before) in enumerate(zip(choice, shape.layers, strict=True)):
        if after is None:
            yield f"{index}: gone"
            continue
        less = [f"{axis.size} {axis.units}" for axis in after.axes if axis.units < before.units(axis.name)]
        less += [f"without {block}" for block in before.blocks if block not in after.blocks]
        if less:
            yield f"{index}: {', '.join(less)}"
