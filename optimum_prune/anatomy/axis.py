"""An axis is what can be made narrower: units that go together, and the parameters that they lie in."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from transformers import PreTrainedConfig

Indices = tuple[int, ...]
Units = Indices | tuple[Indices, ...]
"""Kept units in order; where each group keeps its own, those of each group in turn."""
Observer = Callable[
    [nn.Module, tuple[Any, ...], Mapping[str, Any], "Bool[Tensor, 'windows length']"],
    Iterator[tuple[int, "Float[Tensor, 'tokens units']"]],
]
"""From what a module is called with, and the mask of its tokens: the activations of units, each with the number of their group."""


@dataclass(frozen=True)
class Member:
    """A parameter or a buffer of which each unit of an axis has its part."""

    path: str
    """From the module that the axis belongs to: a decoder layer, or the whole model."""
    dim: int
    """The dimension along which the units lie, as the parameter is stored."""
    stretches: tuple[int, ...] = (1,)
    """Of each stretch of that dimension, one after the other, how many features a unit has in it: (1, 1) where gate and up are fused."""

    def features(self, kept: Int[Tensor, "... kept"], units: int) -> Int[Tensor, "... features"]:
        """Indices along the dimension that belong to the kept units, of `units` in all; `kept` may have a row for each group."""
        start, pieces = 0, []
        for size in self.stretches:
            pieces.append((kept[..., None] * size + torch.arange(size)).flatten(-2) + start)
            start += units * size
        return torch.cat(pieces, dim=-1)


@dataclass(frozen=True)
class Axis:
    """Units of a decoder layer, or of a whole model, that are kept or cut together with all their parameters."""

    name: str
    """What cuts call it."""
    units: int
    members: tuple[Member, ...]
    output: str = ""
    """The parameter whose inputs the units are: in front of it they are observed, and it is refitted for those that are kept."""
    block: str = ""
    """The block of the layer that it belongs to; empty for an axis of the whole model."""
    fields: Mapping[str, int] = field(default_factory=dict)
    """Fields of the config that count the units, each with how many it counts for one."""
    pinned: Mapping[str, int] = field(default_factory=dict)
    """Fields that a config computes from the number of units where it does not say them, with what they must stay."""
    groups: int = 0
    """Where the units are those of several experts in one parameter: how many. Each keeps its own, and as many as the others."""
    grouped_by: str = ""
    """The axis whose units these groups are."""
    chosen: int = 0
    """Through how many of the groups a token goes."""
    possible: Indices | None = None
    """The numbers of units that a config can say, if it cannot say them all."""
    multiple: int = 1
    """Kernels take no number of units but multiples of this."""
    parts: int = 1
    """Into how many parts of one length its units are divided, each of which is to keep as many."""
    follows: str = ""
    """The axis with which this one is cut, since the same field of the config counts both; none if it stands for itself."""
    times: int = 1
    """How many units go with one of the axis that it follows."""
    observed: tuple[str, Observer] | None = None
    """The path of a module and how to read the units' activations from its calls, where they are not the inputs of `output`."""
    size: str = ""
    """What the number of units is called in plans and reports."""
    units_are: str = "units"
    """What the units are, in an error."""
    place: str = ""
    """Where they are, in an error."""

    def described_fields(self) -> dict[str, int]:
        """What the config has to say of this axis."""
        return {name: self.units * times for name, times in self.fields.items()}

    @property
    def width(self) -> int:
        """Features that a unit puts in front of `output`."""
        return sum(self.outgoing.stretches)

    @property
    def outgoing(self) -> Member:
        """Where the units lie in `output`."""
        return next(member for member in self.members if member.path == self.output)

    def inputs(self, kept: Sequence[int]) -> Int[Tensor, " features"]:
        """Indices of the inputs of `output` that belong to kept units."""
        return self.outgoing.features(torch.tensor(kept), self.units)

    def size_along(self, member: Member) -> int:
        """How long the dimension of a member is."""
        return self.units * sum(member.stretches)


@dataclass(frozen=True)
class AxisKind:
    """A kind of axis that decoder layers may have, and how to find it in one; plugins add some by the hook `axes`."""

    name: str
    find: Callable[[Any, nn.Module, PreTrainedConfig], Axis | None]
    """From a `Family`, a decoder layer and the config of the decoder: the axis; None where the layer has none of this kind."""
    block: str = ""
    """The block of a layer that it belongs to; a layer without this block has none."""
    size: str = ""
    """What its number of units is called in plans and reports; the name if not given."""
    column: str = ""
    """The heading of its number of units in a table; as `size` if not given."""
    label: str = ""
    """Stands before the number, where kinds share a column."""
    inputs_are: str = ""
    """What the number of inputs of its output parameter is called, in an error."""

    @property
    def size_name(self) -> str:
        """What its number of units is called in plans and reports."""
        return self.size or self.name

    @property
    def heading(self) -> str:
        """The heading of its number of units in a table."""
        return self.column or self.size_name.replace("_", " ")
