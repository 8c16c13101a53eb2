"""The ways in which a decoder layer may be left, what each costs the model, and which of each layer to take for a target.

Costs of several layers are taken to add up, and so do the parts of one layer. In each layer only those ways matter that lie on the lower
hull of cost over size: a mixture of two of them is better than any other. Whatever a parameter may cost at most, each layer takes
the best way by itself; so one walk along that price answers for every target.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from optimum_prune.anatomy.shape import LayerShape


@dataclass(frozen=True)
class Curve:
    """What it costs a model to leave so many units of an axis of one layer."""

    sizes: tuple[int, ...]
    """From few to many, the last all of them."""
    errors: tuple[float, ...]
    """The relative error of the block's output at each, refitted; 0 at the last."""
    price: float
    """Nats for each token that the model loses for a relative error of 1, as measured at one of the sizes: that hardly depends on which."""

    def at(self, size: int) -> float:
        """Nats for each token."""
        place = bisect_left(self.sizes, size)
        if self.sizes[place] == size or place == 0:
            return self.price * self.errors[place]
        low, high = self.sizes[place - 1], self.sizes[place]
        share = (size - low) / (high - low)
        return self.price * (self.errors[place - 1] * (1 - share) + self.errors[place] * share)


@dataclass(frozen=True)
class Option:
    """A way in which a layer may be left."""

    shape: LayerShape | None
    """None if it goes."""
    size: float
    """In the unit of the target."""
    cost: float
    """Nats for each token."""


@dataclass(frozen=True)
class Prices:
    """What is known of a layer."""

    shape: LayerShape
    curves: Mapping[str, Curve]
    """By the axes that may be narrowed."""
    multiples: Mapping[str, Sequence[int]]
    """The numbers of units of these that are possible, all of them among them."""
    blocks: Mapping[str, tuple[float, int]] = field(default_factory=dict)
    """Of blocks that may go, what that costs, and how many parameters they have."""
    whole: float | None = None
    """What it costs if the layer goes; None if it may not."""

    @property
    def smallest_step(self) -> int:
        """The fewest parameters that can go."""
        return min(
            self.shape.per_unit(name) * min(after - before for before, after in pairwise(self.multiples[name]))
            for name in self.curves
        )

    def ways(self) -> Iterable[tuple[LayerShape | None, float]]:
        """Every way in which it may be left, with its cost."""
        ways: list[tuple[LayerShape, float]] = [(self.shape, 0.0)]
        for block in self.shape.blocks:
            more = []
            for shape, cost in ways:
                more += [(shape, cost), *self._narrowed(block, shape, cost)]
                if block in self.blocks and len(shape.blocks) > 1:
                    price, parameters = self.blocks[block]
                    more.append((shape.without(block, parameters), cost + price))
            ways = more
        return [*ways, *([] if self.whole is None else [(None, self.whole)])]

    def _narrowed(self, block: str, shape: LayerShape, cost: float) -> Iterable[tuple[LayerShape, float]]:
        for axis in shape.axes:
            if axis.block == block and axis.name in self.curves:
                curve = self.curves[axis.name]
                for size in self.multiples[axis.name]:
                    if size < axis.units:
                        yield shape.narrowed({axis.name: size}), cost + curve.at(size)


def hull(options: Iterable[Option]) -> list[Option]:
    """Those on the lower hull of cost over size, from large and free to small and dear."""
    found: list[Option] = []
    for option in sorted(options, key=lambda each: (-each.size, each.cost)):
        if found and option.size == found[-1].size:
            continue
        while found and option.cost <= found[-1].cost:  # as good, and larger
            found.pop()
        while len(found) > 1 and _price(found[-1], option) < _price(found[-2], found[-1]):
            found.pop()
        found.append(option)
    return found


def _price(large: Option, small: Option) -> float:
    """What a step costs for each unit of size that it saves."""
    return (small.cost - large.cost) / (large.size - small.size)


def chosen(layers: Sequence[Sequence[Option]], size: float) -> list[Option]:
    """Of each layer an option, so that together they are no larger than `size`, or as small as they can be, and cost least.

    Args:
        layers: of each, the hull of its options.
    """
    steps = sorted(
        (_price(large, small), index, place)
        for index, options in enumerate(layers)
        for place, (large, small) in enumerate(pairwise(options), start=1)
    )
    taken = [0] * len(layers)
    total = math.fsum(options[0].size for options in layers)
    for _, index, place in steps:
        if total <= size:
            break
        total -= layers[index][taken[index]].size - layers[index][place].size
        taken[index] = place
    _give_back(layers, taken, size - total)
    return [options[place] for options, place in zip(layers, taken, strict=True)]


def _give_back(layers: Sequence[Sequence[Option]], taken: list[int], room: float) -> None:
    """Takes back steps, the dearest first, while there is room for them."""
    back = sorted(
        (
            (_price(options[place - 1], options[place]), index)
            for index, (options, place) in enumerate(zip(layers, taken, strict=True))
            if place
        ),
        reverse=True,
    )
    for _, index in back:
        more = layers[index][taken[index] - 1].size - layers[index][taken[index]].size
        if more <= room:
            taken[index] -= 1
            room -= more


def filled(picked: Sequence[Option], layers: Sequence[Sequence[Option]], size: float) -> list[Option]:
    """The same with what room is left made use of: of one layer after another whatever of all its options saves most of the cost.

    Args:
        layers: of each, all its options.
    """
    found, room = list(picked), size - math.fsum(option.size for option in picked)
    while True:
        better = [
            (found[index].cost - option.cost, -option.size, index, option)
            for index, options in enumerate(layers)
            for option in options
            if found[index].size < option.size <= found[index].size + room and option.cost <= found[index].cost
        ]
        if not better:
            return found
        _, _, index, option = max(better, key=lambda each: each[:3])
        room -= option.size - found[index].size
        found[index] = option


def frontier(layers: Sequence[Sequence[Option]], points: int = 20) -> list[tuple[float, float]]:
    """Sizes from all to the smallest, and what the best choice of each would cost if costs added up."""
    largest = math.fsum(options[0].size for options in layers)
    smallest = math.fsum(options[-1].size for options in layers)
    found = []
    for number in range(points + 1):
        size = largest - (largest - smallest) * number / points
        picked = chosen(layers, size)
        found.append((math.fsum(each.size for each in picked), math.fsum(each.cost for each in picked)))
    return found
