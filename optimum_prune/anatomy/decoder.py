"""A model seen through its family: its decoder layers, each with its blocks and the axes along which it can be cut."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING, cast

from torch import nn

from optimum_prune.anatomy.axes import HIDDEN, KINDS, find_hidden, size_of_unit
from optimum_prune.anatomy.axis import Axis, AxisKind
from optimum_prune.anatomy.family import Family, find_family
from optimum_prune.anatomy.linear import Linear, Projection
from optimum_prune.anatomy.shape import ATTENTION, BLOCKS, AxisShape, FixedWidth, LayerShape, Shape

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

PUTS_OUT_NOTHING = "puts_out_nothing"
"""The attribute that marks a module in the place of a block that was left out."""


@dataclass(frozen=True)
class DecoderLayer:
    """A decoder layer, and where it is."""

    index: int
    module: nn.Module
    family: Family
    config: PreTrainedConfig
    """Of the decoder."""

    @property
    def prefix(self) -> str:
        """Of the names that its parameters have in the model."""
        return f"{self.family.layers}.{self.index}."

    # Blocks

    @property
    def blocks(self) -> tuple[str, ...]:
        """The blocks that it has."""
        last = {block: self.part(self.modules_of(block)[-1]) for block in BLOCKS}
        return tuple(block for block, module in last.items() if not getattr(module, PUTS_OUT_NOTHING, False))

    def modules_of(self, block: str) -> tuple[str, ...]:
        """Paths of the modules that make up a block, from where its hidden states enter to where they leave."""
        if block == ATTENTION:
            return (self.family.attention,)
        feed_forward = self.family.feed_forward
        return (feed_forward.module,) if feed_forward.module else (*feed_forward.inputs, feed_forward.output)

    def output_of(self, block: str) -> str:
        """Path of the parameter through which a block adds to the hidden states."""
        return self.outputs_of(block)[0]

    def outputs_of(self, block: str) -> tuple[str, ...]:
        """Paths of the parameters through which it does, the main one first: shared experts have one of their own."""
        if block == ATTENTION:
            return (f"{self.family.attention_output}.weight",)
        return tuple(axis.output for axis in self.axes.values() if axis.block == block and axis.output)

    def output_parameters(self, block: str) -> dict[str, nn.Parameter]:
        """The weights and biases through which a block adds to the hidden states, by their paths."""
        paths = self.outputs_of(block)
        named = {
            *paths,
            *(f"{path.removesuffix('weight')}bias" for path in paths),
            *(f"{path}_bias" for path in paths),
        }
        return {path: value for path, value in self.module.named_parameters() if path in named}

    def adds_nothing(self, block: str) -> bool:
        """Whether a block that is there puts out zeros whatever it is given, as one does that was left out in the stock form."""
        outputs = self.output_parameters(block)
        return bool(outputs) and not any(bool(value.any()) for value in outputs.values())

    # Axes

    @property
    def axes(self) -> dict[str, Axis]:
        """The axes that it can be cut along as it is now, by name."""
        return {axis.name: axis for axis, _ in self._axes()}

    def _axes(self) -> list[tuple[Axis, AxisKind]]:
        blocks, found = self.blocks, []
        for kind in (*KINDS, *self.family.axes):
            if not kind.block or kind.block in blocks:
                axis = kind.find(self.family, self.module, self.config)
                if axis is not None:
                    found.append((replace(axis, name=kind.name, block=kind.block, size=kind.size_name), kind))
        return found

    def followers(self, axis: Axis) -> list[Axis]:
        """The axes that are cut with an axis."""
        return [other for other in self.axes.values() if other.follows == axis.name]

    def fields(self) -> dict[str, int]:
        """What the config has to say of its sizes."""
        axes = [axis for axis in self.axes.values() if not axis.follows]
        return {name: size for axis in axes for name, size in axis.described_fields().items()}

    def pinned(self, config: PreTrainedConfig) -> dict[str, int]:
        """What a config has to say besides, where the layer has other sizes than it says."""
        return {
            name: size
            for axis in self.axes.values()
            if any(getattr(config, field, None) != value for field, value in axis.described_fields().items())
            for name, size in axis.pinned.items()
        }

    def shape(self, hidden: Axis | None = None) -> LayerShape:
        """Its sizes.

        Args:
            hidden: the axis of the model's hidden states, if that is to be among them.
        """
        found, blocks = self._axes(), self.blocks
        axes = {axis.name: axis for axis, _ in found}
        wide = [] if hidden is None else [_shape_of(hidden, HIDDEN, "")]
        own = [_shape_of(axis, kind, self.output_of(axis.block)) for axis, kind in found if not axis.follows]
        lying = {
            (member.path, member.dim): axes.get(axis.follows, axis)
            for axis in axes.values()
            for member in axis.members
        }
        if hidden is not None:
            lying |= {
                (member.path.removeprefix(self.prefix), member.dim): hidden
                for member in hidden.members
                if member.path.startswith(self.prefix)
            }
        inner = {axis.block for axis in own if axis.inner}
        fixed = [self._fixed_width(block) for block in blocks if block not in inner]
        return LayerShape((*own, *wide), _terms(self.module, lying), blocks, tuple(fixed))

    def _fixed_width(self, block: str) -> FixedWidth:
        width = self.linear_of(self.output_of(block)).weight.shape[1]
        return FixedWidth(block, f"width of {block}", width, size_of_unit(self.part(self.modules_of(block)[0]), width))

    # Modules

    def part(self, path: str) -> nn.Module:
        """The module at a path from the layer.

        Raises:
            FamilyError: it is not there.
        """
        return self.family.module(self.module, path)

    def linear_of(self, parameter: str) -> Linear:
        """The linear module that a weight belongs to.

        Raises:
            FamilyError: it is not there, or is not linear.
        """
        return self.family.linear(self.module, parameter.rpartition(".")[0])

    def projection(self, parameter: str) -> Projection:
        """The linear maps in a parameter of the layer: one, or, where experts lie in one tensor, one for each."""
        stored = self.module.get_parameter(parameter).detach()
        if stored.ndim > 2:
            return Projection(parameter, list(stored), None, None)
        linear = self.linear_of(parameter)
        return Projection(parameter, [linear.weight], linear.bias, linear)

    def named(self, weights: Mapping[str, object]) -> dict[str, object]:
        """The same by the names that they have in the model."""
        return {f"{self.prefix}{path}": value for path, value in weights.items()}


@dataclass(frozen=True)
class Decoder:
    """A model and its family, bound once."""

    model: PreTrainedModel
    family: Family

    @classmethod
    def of(cls, model: PreTrainedModel, families: Iterable[Family]) -> Decoder:
        """A model with that of the families which describes it.

        Raises:
            FamilyError: none does.
        """
        return cls(model, find_family(model.config, families))

    @property
    def config(self) -> PreTrainedConfig:
        """The part of the model's config that is about the decoder."""
        return self.family.text_config(self.model.config)

    @property
    def modules(self) -> nn.ModuleList:
        """The list of the model's decoder layers.

        Raises:
            FamilyError: there is no such list in this model.
        """
        return cast(nn.ModuleList, self.family.module(self.model, self.family.layers, nn.ModuleList))

    @property
    def layers(self) -> list[DecoderLayer]:
        """The decoder layers as they are now."""
        return [self.layer(index) for index in range(len(self.modules))]

    def layer(self, index: int) -> DecoderLayer:
        """A decoder layer."""
        return DecoderLayer(index, self.modules[index], self.family, self.config)

    def __len__(self) -> int:
        """How many decoder layers there are."""
        return len(self.modules)

    def put_layers(self, layers: Iterable[nn.Module]) -> None:
        """Puts other decoder layers in the place of the model's; its config is not touched."""
        parent, _, name = self.family.layers.rpartition(".")
        setattr(self.model.get_submodule(parent), name, nn.ModuleList(layers))

    def hidden(self) -> Axis | None:
        """The axis of the features of hidden states, along which the whole model can be cut; None if its config cannot say it."""
        layers = self.layers
        sizes = {name: size for layer in layers for axis in layer.axes.values() for name, size in axis.pinned.items()}
        if getattr(self.model.config, "pruned", None) is None:  # else the config knows the sizes of each layer
            sizes |= {name: size for layer in layers for name, size in layer.fields().items()}
        outputs = {f"{layer.prefix}{layer.output_of(block)}" for layer in layers for block in layer.blocks}
        return find_hidden(self.family, self.model, sizes, outputs)

    def shape(self) -> Shape:
        """Its sizes, with or without storage for its weights.

        Raises:
            FamilyError: the model does not look as its family says.
        """
        hidden = self.hidden()
        lying = {} if hidden is None else {(member.path, member.dim): hidden for member in hidden.members}
        axes = () if hidden is None else (_shape_of(hidden, HIDDEN, ""),)
        rest = LayerShape(axes, _terms(self.model, lying, without=f"{self.family.layers}."), ())
        return Shape(tuple(layer.shape(hidden) for layer in self.layers), rest)


def _shape_of(axis: Axis, kind: AxisKind, output: str) -> AxisShape:
    """The size of an axis.

    Args:
        output: the parameter through which its block adds to the hidden states.
    """
    return AxisShape(
        name=axis.name,
        units=axis.units,
        block=axis.block,
        width=axis.width if axis.output and axis.output == output else 0,
        groups=axis.groups,
        grouped_by=axis.grouped_by,
        chosen=axis.chosen,
        possible=axis.possible,
        pinned=axis.pinned,
        multiple=axis.multiple,
        size=kind.size_name,
        column=kind.heading,
        label=kind.label,
        inputs_are=kind.inputs_are,
        units_are=axis.units_are,
    )


def _terms(
    module: nn.Module, lying: Mapping[tuple[str, int], Axis], without: str | None = None
) -> tuple[tuple[tuple[str, ...], int], ...]:
    """The parameters of a module as a sum of products of units.

    Args:
        lying: path and dimension of a parameter -> the axis along that dimension.
        without: parameters whose names begin so do not count.
    """
    terms = Counter[tuple[str, ...]]()
    for name, parameter in module.named_parameters():
        if without is not None and name.startswith(without):
            continue
        along = [lying[name, dim] for dim in range(parameter.ndim) if (name, dim) in lying]
        terms[tuple(sorted(axis.name for axis in along))] += parameter.numel() // prod(axis.units for axis in along)
    return tuple(sorted(terms.items()))
