"""A model whose layers differ in shape as a stock model: what is missing of narrower layers is filled up with zeros.

A unit of zeros puts out zero, and so does a block of them; so the model computes what it did, and takes the memory and the time of one all
of whose layers are as large as the largest.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import nn

from optimum_prune.anatomy.axis import Axis, Units
from optimum_prune.anatomy.decoder import Decoder, DecoderLayer
from optimum_prune.surgery.cuts import Cuts
from optimum_prune.surgery.operation import cut_layer, sharing_copy

if TYPE_CHECKING:
    from torch import Tensor

    from optimum_prune.anatomy.shape import LayerShape


@torch.no_grad()
def padded(decoder: Decoder) -> Decoder:
    """The stock model that computes the same; the given one stays as it is.

    Args:
        decoder: a model whose layers differ, of which none differs in its number of experts.
    """
    whole = _zeros(decoder)
    own = dict(decoder.model.named_parameters())
    for name, parameter in whole.model.named_parameters():
        if name in own and own[name].shape == parameter.shape:
            parameter.copy_(own[name])
    for small, large in zip(decoder.layers, whole.layers, strict=True):
        full = dict(large.module.named_parameters())
        narrower = {name: each for name, each in small.module.named_parameters() if each.shape != full[name].shape}
        places = _places(large, small.shape()) if narrower else {}
        for name, parameter in narrower.items():
            full[name].view(-1)[places[name].flatten()] = parameter.flatten()
    whole.model.eval()
    return whole


def _zeros(decoder: Decoder) -> Decoder:
    """A stock model of zeros, all of whose layers are as large as the largest."""
    from accelerate import init_empty_weights

    from optimum_prune.surgery.configuration_pruned import stock_of
    from optimum_prune.surgery.modeling_pruned import stock_config

    model = decoder.model
    with init_empty_weights(include_buffers=False):
        made = stock_of(type(model))(stock_config(model))
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
    for path, module in made.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            dtype = dtypes.get(f"{path}.{name}".lstrip("."), model.dtype)
            setattr(module, name, nn.Parameter(torch.zeros(parameter.shape, dtype=dtype), requires_grad=False))
    made.tie_weights()
    made.generation_config = copy.deepcopy(model.generation_config)
    return replace(decoder, model=made)


def _places(layer: DecoderLayer, shape: LayerShape) -> dict[str, Tensor]:
    """Where each parameter of a layer of a shape has its values in a larger layer: cut out of their numbers as weights are."""
    numbered = replace(layer, module=sharing_copy(layer.module, layer.config))
    for module in numbered.module.modules():
        for name, parameter in module.named_parameters(recurse=False):
            numbers = torch.arange(parameter.numel()).view(parameter.shape)
            setattr(module, name, nn.Parameter(numbers, requires_grad=False))
    gone = {} if shape.blocks == layer.blocks else {layer.index: shape.blocks}
    units: Mapping[tuple[int | None, str], Units] = {
        (layer.index, name): kept for name, kept in leading(layer.axes.values(), shape)
    }
    cut_layer(numbered, Cuts(blocks=gone, units=units))
    return dict(numbered.module.named_parameters())


def leading(axes: Iterable[Axis], after: LayerShape) -> Iterator[tuple[str, Units]]:
    """Of the axes that have fewer units afterwards, the first units of each part of them."""
    axes = list(axes)
    left = {axis.name: after.units(axis.name) for axis in axes if axis.block in after.blocks}
    for axis in axes:
        count = left.get(axis.follows, 0) * axis.times if axis.follows in left else left.get(axis.name, 0)
        if not 0 < count < axis.units:
            continue
        size = axis.units // axis.parts
        kept = tuple(part * size + unit for part in range(axis.parts) for unit in range(count // axis.parts))
        yield axis.name, (kept,) * axis.groups if axis.groups else kept
