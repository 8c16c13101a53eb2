"""Which models of a size there might be: each layer its own, or all alike, from what every layer costs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
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

    def frontier(self) -> list[tuple[float, float]]:
        """Sizes of whole models, from all to the smallest, and what the best choice of each would cost if costs added up."""
        rest = self.measure.of_rest(self.rest)
        return [(size + rest, cost) for size, cost in frontier(self._options())]

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
        picked = chosen(self._options(), room)
        ways = [list(self._ways(index, prices)) for index, prices in enumerate(self.layers)]
        return filled(picked, ways, room)

    def with_states(self, size: int) -> PriceList:
        """Of the same model once its hidden states have so many features; what that costs is not among these prices."""
        states = {STATES: size}
        layers = [replace(each, shape=each.shape.narrowed(states)) for each in self.layers]
        return replace(self, layers=layers, rest=self.rest.narrowed(states))

    def even(self, size: float, most: int, miss: float = 0.0) -> list[Priced]:
        """The best choices in which all layers that stay are alike, nearest to a size.

        For each number of layers that go, and each number of units of the axes but one, that one is narrowed to what is nearest.

        Args:
            most: of the choices.
            miss: how much of the size they may miss, where nothing of layers can be narrowed to come nearer.
        """
        first = self.layers[0]
        widest = max(first.curves, key=lambda name: len(first.multiples[name]), default=None)
        if widest is None:
            sizes: Mapping[str, Sequence[int]] = {}
        else:
            sizes = {name: first.multiples[name] for name in first.curves if name != widest}
        found: dict[Choice, float] = {}
        for gone in range(len(self.layers) // 2 + 1):
            for units in product(*sizes.values()):
                choice = self._even(gone, dict(zip(sizes, units, strict=True)), widest, size, miss)
                if choice is not None:
                    found[choice[0]] = choice[1]
        return sorted(((choice, cost) for choice, cost in found.items() if math.isfinite(cost)), key=cost_of)[:most]

    def _even(
        self, gone: int, units: Mapping[str, int], widest: str | None, size: float, miss: float
    ) -> Priced | None:
        """The best choice with so many layers gone and these units, the widest axis narrowed to what is left of a size; None without any."""
        first = self.layers[0]
        fits = [first.shape.narrowed(units)]
        if widest is not None:
            fits = [fits[0].narrowed({widest: each}) for each in first.multiples[widest]]
        stay, room = len(self.layers) - gone, size - self.measure.of_rest(self.rest)
        sizes = [stay * self._on_average(shape) for shape in fits]
        nearest = min(range(len(fits)), key=lambda place: abs(sizes[place] - room))
        step = max((abs(a - b) for a, b in pairwise(sizes)), default=max(stay, miss))
        if abs(sizes[nearest] - room) > step / 2:
            return None
        return self._with_gone(gone, fits[nearest])

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
