"""What of a model may become less for a budget, and to how little."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from optimum_prune.anatomy.shape import ATTENTION, FEED_FORWARD, STATES, AxisShape, LayerShape, Shape
from optimum_prune.errors import RecipeError
from optimum_prune.selection.measures import Measure
from optimum_prune.selection.options import Curve, Prices
from optimum_prune.selection.targets import Target, hidden_axis, sizes_of

LAYERS, BLOCKS = "layers", "blocks"
"""What may go besides the units of axes."""
SEEN = (1 / 6, 1 / 3, 1 / 2, 2 / 3, 5 / 6)
"""Fractions of the units of an axis at which it is looked what they cost."""
FEWEST = 1 / 6
"""Of the units of an axis so many stay: with fewer, what it loses is no longer in proportion."""


@dataclass(frozen=True)
class Allowed:
    """Which layers, blocks and units may go."""

    step: str
    """The pass that asks."""
    names: tuple[str, ...] = ()
    """Layers, blocks, or axes by their names; everything but hidden states if none are given."""
    protect: tuple[int, ...] = ()
    """Layers that stay as they are."""
    multiple_of: int | None = None
    even: bool = False
    """Whether all layers that stay are to be alike."""
    fewest: float = FEWEST
    """Of the units of an axis so many stay at least, as a fraction."""
    one_less: bool = False
    """Whether of attention no more than one unit goes, or as few as can."""

    def allows(self, name: str) -> bool:
        """Whether something of this name may become less."""
        return not self.names or name in self.names

    def may_go(self, index: int) -> bool:
        """Whether a layer may: the first has nothing in front of it."""
        return self.allows(LAYERS) and index > 0 and index not in self.protect

    def may_lack_attention(self, index: int) -> bool:
        """Whether a layer may be left without its attention."""
        return self.allows(BLOCKS) and not self.even and index not in self.protect

    def states(self, shape: Shape) -> list[int]:
        """To how many features hidden states may become narrower: only where that is asked for, since it costs most by far."""
        return sizes_of(hidden_axis(self.step, shape)) if STATES in self.names else []

    def sizes(self, index: int, layer: LayerShape) -> dict[str, list[int]]:
        """Of each axis of a layer that may be narrowed, how many units may be left, from few to all."""
        if index in self.protect:
            return {}
        possible = {axis.name: self._possible(axis) for axis in layer.narrowable if self.allows(axis.name)}
        return {name: sizes for name, sizes in possible.items() if len(sizes) > 1}

    def _possible(self, axis: AxisShape) -> list[int]:
        if not axis.many:
            fewer = [size for size in axis.fewer if size >= math.floor(self.fewest * axis.units)]
            return [*(fewer[-1:] if self.one_less and axis.block == ATTENTION else fewer), axis.units]
        multiple = Target(self.step, axis.block, (), self.multiple_of).multiple(axis)
        least = max(math.ceil(self.fewest * axis.units / multiple), 1) * multiple
        return [*(size for size in range(least, axis.units, multiple) if size in axis.fewer), axis.units]

    def seen(self, index: int, layer: LayerShape) -> dict[str, list[int]]:
        """Of each of these axes, the sizes at which it is looked what they cost, from many to few."""
        return {name: _some(sizes) for name, sizes in self.sizes(index, layer).items()}

    def check(self, shape: Shape) -> None:
        """Refuses what cannot be.

        Raises:
            RecipeError: a name is not there, or layers are not alike.
        """
        units = (axis.name for layer in shape.layers for axis in layer.narrowable)
        known = dict.fromkeys([LAYERS, BLOCKS, *units, *([STATES] if shape.rest.units(STATES) else [])])
        for name in self.names:
            if name not in known:
                raise RecipeError(
                    f"{self.step} is to allow '{name}' to become less. Of this model there are: {', '.join(known)}."
                )
        if STATES in self.names and not self.even:
            raise RecipeError(
                f"{self.step} is to allow narrower hidden states, which are as wide in every layer. Ask for the form 'stock'."
            )
        if self.even and not shape.even:
            raise RecipeError(
                f"{self.step} has form 'stock', in which all layers are alike, and those of this model are not. Use the form 'heterogeneous'."
            )

    def smallest(self, shape: Shape, measure: Measure) -> float:
        """What the smallest model has that may be left: of two layers beside each other, one stays."""
        shape = shape.narrowed({STATES: min(states)}) if (states := self.states(shape)) else shape
        left, gone = measure.of_rest(shape.rest), False
        for index, layer in enumerate(shape.layers):
            gone = self.may_go(index) and not gone
            left += 0.0 if gone else min(measure.of(index, way) for way, _ in self._free(index, layer).ways() if way)
        return left

    def _free(self, index: int, layer: LayerShape) -> Prices:
        """A layer that may be left in any way at no cost."""
        sizes = self.sizes(index, layer)
        return Prices(
            layer, {name: Curve(tuple(each), (0.0,) * len(each), 0.0) for name, each in sizes.items()}, sizes
        )

    def of_size(self, shape: Shape, parameters: float) -> Shape:
        """A shape of about so many parameters: which layer loses what is for a search to find out."""
        stays = sum(shape.layers[index].parameters for index in self.protect)
        of_others = shape.parameters - shape.rest.parameters - stays
        share = (parameters - shape.rest.parameters - stays) / of_others
        layers = tuple(
            layer if index in self.protect else layer.of_size(round(layer.parameters * share))
            for index, layer in enumerate(shape.layers)
        )
        if self.even:
            return replace(shape, layers=layers)
        multiples = Target(self.step, FEED_FORWARD, self.protect, self.multiple_of).least(shape)
        few = {axis.name: 1 for layer in shape.layers for axis in layer.narrowable if not axis.many}
        searched = {name: each for name, each in {**few, **multiples}.items() if self.allows(name)}
        return replace(shape, layers=layers, searched=searched, searched_blocks=self.allows(BLOCKS))


def _some(sizes: Sequence[int]) -> list[int]:
    fewer = sizes[:-1]
    near = {min(fewer, key=lambda size: abs(size - share * sizes[-1])) for share in SEEN}
    return sorted({*near, fewer[0]}, reverse=True)
