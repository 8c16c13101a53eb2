"""The sizes of a model that pruning changes, as passes foresee them and plans print them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import NamedTuple

from optimum_prune.anatomy.axis import Indices

ATTENTION, FEED_FORWARD = "attention", "feed_forward"
BLOCKS = (ATTENTION, FEED_FORWARD)
"""The blocks of a decoder layer, in the order in which hidden states go through them or beside each other."""
STATES = "hidden"
"""The axis of the features of hidden states, as wide in the whole model."""

Term = tuple[tuple[str, ...], int]
"""Some axes, and how many parameters there are for each combination of their units."""


@dataclass(frozen=True)
class AxisShape:
    """The size of an axis."""

    name: str
    units: int
    block: str = ""
    """Of which it is a part; empty for an axis of the whole model."""
    width: int = 1
    """Features that a unit puts in front of its block's output; 0 if it does not lie there."""
    groups: int = 0
    """Experts that each have so many units; 0 where they are no experts'."""
    grouped_by: str = ""
    """The axis whose units these experts are."""
    chosen: int = 0
    """Through how many of these experts a token goes."""
    possible: Indices | None = field(default=None, compare=False)
    """The numbers of units that a config can say, if it cannot say them all. Not a size, and for `hidden` a matter of how many heads
    there are: foreseen from a larger model, there may be fewer of them than the smaller one has."""
    pinned: Mapping[str, int] = field(default_factory=dict, compare=False)
    """Fields of the config that stay as they are however many units there are."""
    multiple: int = 1
    """Kernels take no number of units but multiples of this."""
    size: str = ""
    """What its number of units is called in plans and reports."""
    column: str = ""
    """The heading of its number of units in a table."""
    label: str = ""
    """Stands before the number, where several share a column."""
    inputs_are: str = ""
    """What the number of inputs of its block's output is called."""
    units_are: str = "units"
    """What its units are, in an error."""

    @property
    def inner(self) -> bool:
        """Whether its units are what is in front of its block's output, which can be refitted for some of them."""
        return self.width > 0

    @property
    def many(self) -> bool:
        """Whether its units are single features, of which a multiple is kept: not heads, and not experts, which are few."""
        return self.inner and self.block != ATTENTION

    @property
    def fewer(self) -> Indices:
        """The smaller numbers of units that a config can say."""
        counts = range(1, self.units) if self.possible is None else self.possible
        return tuple(count for count in counts if count < self.units)

    @property
    def active(self) -> float:
        """Of these experts, the fraction that a token goes through."""
        return min(self.chosen / self.groups, 1.0) if self.groups else 1.0

    def narrowed(self, units: int, groups: int) -> AxisShape:
        """With fewer units, and of so many experts where it has these."""
        possible = None if self.possible is None else tuple(count for count in self.possible if count <= units)
        return replace(self, units=units, groups=groups, possible=possible)

    def describe(self) -> str:
        """Its number of units, such as `1280` or `experts 512`."""
        return f"{self.label} {self.units}".strip()


class FixedWidth(NamedTuple):
    """The width in front of a block's output, where no axis changes it."""

    block: str
    inputs_are: str
    """What it is called."""
    width: int
    unit: int
    """Features that belong together."""


@dataclass(frozen=True)
class LayerShape:
    """The sizes of a decoder layer that pruning changes, and its parameters as a function of them."""

    axes: tuple[AxisShape, ...] = ()
    terms: tuple[Term, ...] = ()
    """The parameters are the sum of these, each times the units of its axes."""
    blocks: tuple[str, ...] = BLOCKS
    """Those that it has."""
    fixed: tuple[FixedWidth, ...] = ()
    """Of blocks whose inner width no axis changes."""

    def axis_named(self, name: str) -> AxisShape:
        """The axis of a name, which the layer has.

        Raises:
            KeyError: it has not.
        """
        return {axis.name: axis for axis in self.axes}[name]

    def units(self, name: str) -> int:
        """Units of an axis; 0 where the layer has none of this name."""
        return next((axis.units for axis in self.axes if axis.name == name), 0)

    @property
    def parameters(self) -> int:
        """Of the layer."""
        units = {axis.name: axis.units for axis in self.axes}
        return sum(each * prod(units[name] for name in names) for names, each in self.terms)

    def per_unit(self, name: str) -> int:
        """Parameters that go with one unit of an axis."""
        units = {axis.name: axis.units for axis in self.axes}
        return sum(
            each * prod(units[other] for other in names if other != name)
            for names, each in self.terms
            if name in names
        )

    def narrowed(self, units: Mapping[str, int]) -> LayerShape:
        """With other numbers of units, by axis, and the parameters that follow; what is not there is passed over."""
        narrowed = (
            axis.narrowed(units.get(axis.name, axis.units), units.get(axis.grouped_by, axis.groups))
            for axis in self.axes
        )
        return replace(self, axes=tuple(narrowed))

    def of_size(self, parameters: int) -> LayerShape:
        """With so many parameters, for reasons that are no axis's."""
        return replace(self, terms=(*self.terms, ((), parameters - self.parameters)))

    def without(self, block: str, parameters: int) -> LayerShape:
        """Without a block, which has so many parameters."""
        left = self.parameters - parameters
        axes = tuple(axis for axis in self.axes if axis.block != block)
        gone = {axis.name for axis in self.axes} - {axis.name for axis in axes}
        terms = tuple((names, each) for names, each in self.terms if not gone & set(names))
        blocks = tuple(each for each in self.blocks if each != block)
        fixed = tuple(each for each in self.fixed if each.block != block)
        return LayerShape(axes, terms, blocks, fixed).of_size(left)

    def within(self, block: str) -> tuple[AxisShape, ...]:
        """The axes of a block that are in front of its output."""
        return tuple(axis for axis in self.axes if axis.block == block and axis.inner)

    @property
    def narrowable(self) -> tuple[AxisShape, ...]:
        """The axes of which it is known how units are chosen: those in front of an output, and those whose units are groups of such."""
        grouped = {axis.grouped_by for axis in self.axes if axis.inner}
        return tuple(axis for axis in self.axes if axis.inner or axis.name in grouped)

    def width(self, block: str) -> int:
        """Features in front of a block's output, of one expert if it is a mixture; 0 where there is no such block."""
        if block not in self.blocks:
            return 0
        widths = [axis.units * axis.width for axis in self.within(block)]
        return max([*widths, *(fixed.width for fixed in self.fixed if fixed.block == block)], default=0)

    def unit(self, block: str) -> int:
        """Features in front of a block's output that belong together: of attention, those that share one row of scores."""
        units = [
            *(axis.width for axis in self.within(block)),
            *(each.unit for each in self.fixed if each.block == block),
        ]
        return max(units, default=1)

    @property
    def routed(self) -> int:
        """Parameters of experts, of which a token goes through some."""
        return max((axis.units * self.per_unit(axis.name) for axis in self.axes if axis.groups), default=0)

    @property
    def active(self) -> float:
        """Of the parameters of experts, the fraction that a token goes through."""
        return min((axis.active for axis in self.axes if axis.groups), default=1.0)


@dataclass(frozen=True)
class Shape:
    """The sizes of a model that pruning changes."""

    layers: tuple[LayerShape, ...]
    rest: LayerShape = LayerShape()
    """What belongs to no decoder layer: embeddings, head, last norm."""
    searched: Mapping[str, int] = field(default_factory=dict)
    """Axes of which a search decides how many units each layer keeps: all will be multiples of this."""
    searched_blocks: bool = False
    """Whether a search decides which attention and FFN blocks are left out."""

    @property
    def parameters(self) -> int:
        """Of the whole model."""
        return self.rest.parameters + sum(layer.parameters for layer in self.layers)

    def keep(self, kept: Iterable[int]) -> Shape:
        """With these layers only."""
        return replace(self, layers=tuple(self.layers[index] for index in kept))

    def narrowed(self, units: Mapping[str, int]) -> Shape:
        """With other numbers of units everywhere, by axis."""
        return replace(
            self, layers=tuple(layer.narrowed(units) for layer in self.layers), rest=self.rest.narrowed(units)
        )

    @property
    def even(self) -> bool:
        """Whether all layers are alike, and no search will change that."""
        return len(set(self.layers)) == 1 and not self.searched and not self.searched_blocks

    @property
    def heterogeneous(self) -> bool:
        """Whether layers differ in size or lack a block, or may once a search is over; where there are several kinds of layers, those of one kind."""
        names = {axis.name for layer in self.layers for axis in layer.axes}
        sizes = ({layer.units(name) for layer in self.layers} - {0} for name in names)
        incomplete = any(len(layer.blocks) < len(BLOCKS) for layer in self.layers)
        return bool(self.searched or self.searched_blocks) or incomplete or any(len(each) > 1 for each in sizes)

    def describe(self) -> str:
        """In a line."""
        sizes = (f"{column} {text}" for column, text in self.columns().items())
        return ", ".join([f"{len(self.layers)} layers", *sizes])

    def columns(self) -> dict[str, str]:
        """The number of units by the heading of the column it is shown in, such as `768-1536 (1280 on average)`."""
        named = {axis.name: axis for layer in self.layers for axis in layer.axes if axis.column}
        found: dict[str, list[str]] = {}
        for name, axis in named.items():
            sizes = _range([layer.units(name) for layer in self.layers if layer.units(name)])
            found.setdefault(axis.column, []).append(f"{axis.label} {sizes}".strip())
        return {column: ", ".join(texts) for column, texts in found.items()}


def _range(sizes: Sequence[int]) -> str:
    if not sizes or min(sizes) == max(sizes):
        return str(sizes[0]) if sizes else ""
    return f"{min(sizes)}-{max(sizes)} ({sum(sizes) / len(sizes):.4g} on average)"
