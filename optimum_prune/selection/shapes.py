"""Which models of a size there might be: each layer its own, or all alike, from what every layer costs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise, product

from optimum_prune.anatomy.shape import LayerShape, Shape
from optimum_prune.selection.options import Option, Prices, chosen, hull

Choice = tuple[LayerShape | None, ...]
"""Of each layer, what is left of it."""


def size_of(shape: LayerShape | None) -> float:
    """Parameters of what is left of a layer."""
    return 0.0 if shape is None else float(shape.parameters)


def options_of(prices: Prices) -> list[Option]:
    """The hull of the ways in which a layer may be left."""
    return hull(Option(shape, size_of(shape), cost) for shape, cost in prices.ways() if math.isfinite(cost))


def best_choice(layers: Sequence[Prices], parameters: float) -> tuple[Choice, float]:
    """The best choice of no more parameters, each layer its own, and its cost."""
    picked = chosen([options_of(each) for each in layers], parameters)
    return tuple(option.shape for option in picked), math.fsum(option.cost for option in picked)


def choices_among(layers: Sequence[Prices], parameters: float) -> list[tuple[Choice, float]]:
    """The best choices of no more parameters: of everything that may go, without whole layers, and of units alone."""
    without_layers = [replace(each, whole=None) for each in layers]
    units_alone = [replace(each, whole=None, blocks={}) for each in layers]
    found: dict[Choice, float] = {}
    for given in (layers, without_layers, units_alone):
        choice, cost = best_choice(given, parameters)
        if sum(map(size_of, choice)) <= parameters * (1 + 1e-3):  # it was within reach
            found.setdefault(choice, cost)
    return sorted(found.items(), key=_cost)


def _cost(choice: tuple[Choice, float]) -> float:
    return choice[1]


def even_choices(layers: Sequence[Prices], parameters: float, most: int) -> list[tuple[Choice, float]]:
    """The best choices in which all layers that stay are alike, nearest to so many parameters.

    For each number of layers that go, and each number of units of the axes but one, that one is narrowed to what is nearest.

    Args:
        most: of the choices.
    """
    first = layers[0]
    widest = max(first.curves, key=lambda name: len(first.multiples[name]), default=None)
    if widest is None:
        sizes: Mapping[str, Sequence[int]] = {}
    else:
        sizes = {name: first.multiples[name] for name in first.curves if name != widest}
    found: dict[Choice, float] = {}
    for gone in range(len(layers) // 2 + 1):
        for units in product(*sizes.values()):
            narrow = dict(zip(sizes, units, strict=True))
            choice = _even(layers, gone, narrow, widest, parameters)
            if choice is not None:
                found[choice[0]] = choice[1]
    return sorted(((choice, cost) for choice, cost in found.items() if math.isfinite(cost)), key=_cost)[:most]


def _even(
    layers: Sequence[Prices], gone: int, units: Mapping[str, int], widest: str | None, parameters: float
) -> tuple[Choice, float] | None:
    """The best choice with so many layers gone and these units, the widest axis narrowed to what is left of the parameters; None without any."""
    stay, shape = len(layers) - gone, layers[0].shape.narrowed(units)
    fits = [shape]
    if widest is not None:
        fits = [shape.narrowed({widest: size}) for size in layers[0].multiples[widest]]
    shape = min(fits, key=lambda each: abs(stay * each.parameters - parameters))
    step = max((abs(a.parameters - b.parameters) for a, b in pairwise(fits)), default=0)
    if abs(stay * shape.parameters - parameters) > stay * max(step, 1) / 2:
        return None
    costs = [_cost_as(each, shape) for each in layers]
    gains = sorted(
        (each.whole - cost, index)
        for index, (each, cost) in enumerate(zip(layers, costs, strict=True))
        if each.whole is not None
    )
    if len(gains) < gone:
        return None
    goes = {index for _, index in gains[:gone]}
    total = math.fsum(layers[index].whole or 0.0 if index in goes else cost for index, cost in enumerate(costs))
    return tuple(None if index in goes else shape for index in range(len(layers))), total


def _cost_as(prices: Prices, shape: LayerShape) -> float:
    """What it costs to leave a layer so."""
    return math.fsum(
        prices.curves[axis.name].at(axis.units)
        for axis in shape.axes
        if axis.name in prices.curves and axis.units < prices.shape.units(axis.name)
    )


def parameters_of(choice: Choice, shape: Shape) -> float:
    """Of the whole model."""
    return shape.rest.parameters + sum(map(size_of, choice))


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
