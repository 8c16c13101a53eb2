"""The only module that changes a shape: decisions carried out on a model."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from optimum_prune.anatomy.axis import Axis, Member, Units
from optimum_prune.anatomy.decoder import Decoder, DecoderLayer
from optimum_prune.errors import SurgeryError
from optimum_prune.surgery.config import follow_config, follow_features, follow_hidden, keep_layers_in_config
from optimum_prune.surgery.cuts import Cuts, Decision

M = TypeVar("M", bound=nn.Module)


def carry_out(decoder: Decoder, decision: Decision) -> None:
    """Cuts a model in place as decided: blocks and units, then new weights, then layers.

    The config is left to `sync_config`, since a pass may decide one layer at a time.

    Raises:
        SurgeryError: the decision names a layer, block, axis, unit or parameter that is not there, or would leave nothing.
    """
    cuts = decision.cuts
    for index in cuts.touched:
        if not 0 <= index < len(decoder):
            parts = [*(["blocks"] if index in cuts.blocks else []), *(axis for axis, _ in cuts.of(index))]
            raise SurgeryError(
                f"{parts[0].capitalize()} of layer {index} are to be cut, but the model has layers 0 to {len(decoder) - 1}."
            )
    hidden = (
        decoder.hidden() if any(index is None for index, _ in cuts.units) else None
    )  # the config knows of no other cut yet
    for index in cuts.touched:
        cut_layer(decoder.layer(index), cuts)
    cut_model(decoder, cuts, hidden)
    assign(decoder.model, decision.weights)
    if cuts.layers is not None:
        keep_layers(decoder, cuts.layers)


def cut_layer(layer: DecoderLayer, cuts: Cuts) -> None:
    """Makes of a decoder layer, in place, what the cuts say of a layer with its index."""
    if layer.index in cuts.blocks:
        keep_blocks(layer, cuts.blocks[layer.index])
    kept = dict(cuts.of(layer.index))
    if not kept:
        return
    axes = layer.axes
    if unknown := sorted(kept.keys() - axes.keys()):
        raise SurgeryError(
            f"The {unknown[0]} of layer {layer.index} are to be cut, which the family '{layer.family.name}' cannot say of it: either there "
            f"are none, or its config has no field for fewer of them. It can say: {', '.join(axes) or 'nothing'}."
        )
    for name, axis in axes.items():
        if name in kept:
            keep(layer.module, axis, kept[name])
    follow_config(layer)  # modules may ask their config for numbers while they run


def local_members(axis: Axis, prefix: str) -> list[Member]:
    """The members of an axis of the whole model that lie in a decoder layer, by their paths from there."""
    inside = (member for member in axis.members if member.path.startswith(prefix))
    return [replace(member, path=member.path.removeprefix(prefix)) for member in inside]


def with_fewer_features(layer: DecoderLayer, axis: Axis, units: int) -> DecoderLayer:
    """A copy of a decoder layer with so many features of hidden states, the first; the model stays as it is.

    Args:
        axis: of the whole model's hidden states.
    """
    copied = replace(layer, module=sharing_copy(layer.module, layer.config))
    keep(copied.module, replace(axis, members=tuple(local_members(axis, layer.prefix))), tuple(range(units)))
    follow_features(copied, axis, units)
    return copied


def with_units_of(layer: DecoderLayer, axis: Axis, others: Sequence[Mapping[str, Tensor]]) -> DecoderLayer:
    """A copy of a decoder layer whose axis has the units of others behind its own; the model stays as it is.

    Args:
        others: of each, the parameters that its units lie in, by the paths of the axis's members.
    """
    copied = replace(layer, module=sharing_copy(layer.module, layer.config))
    for member in axis.members:
        parts = [layer.module.get_parameter(member.path).detach(), *(other[member.path] for other in others)]
        # Of each stretch, the units of all one after the other.
        split = [part.tensor_split(len(member.stretches), member.dim) for part in parts]
        value = torch.cat([stretch for stretches in zip(*split, strict=True) for stretch in stretches], member.dim)
        _put(copied.module, member.path, nn.Parameter(value, requires_grad=False))
    return copied


def cut_model(decoder: Decoder, cuts: Cuts, axis: Axis | None) -> None:
    """Makes of a whole model, in place, what the cuts say of its hidden states, which are an axis of it."""
    for (index, name), kept in cuts.units.items():
        if index is not None:
            continue
        if axis is None or name != axis.name:
            raise SurgeryError(
                f"The {name} of the model is to be cut, which the config of the family '{decoder.family.name}' cannot say."
            )
        keep(decoder.model, axis, kept)
        follow_hidden(decoder, axis, len(kept))


def changed_layer(decoder: Decoder, decision: Decision, index: int) -> nn.Module:
    """A copy of a decoder layer on which what a decision says of it is carried out; the model stays.

    What the decision does not change takes no memory: surgery puts new values in place of old ones, and never overwrites them.
    """
    original = decoder.layer(index)
    layer = replace(original, module=sharing_copy(original.module, decoder.config))
    cut_layer(layer, decision.cuts)
    assign(layer.module, {name.removeprefix(layer.prefix): value for name, value in decision.weights.items()})
    return layer.module


def sharing_copy(module: M, *kept: object) -> M:
    """A copy of a module that takes no memory: it shares every tensor, and stays as it is when surgery puts others in their place.

    Args:
        kept: objects in it that are the same in the copy.
    """
    shared: dict[int, Any] = {id(each): each for each in (*kept, *module.buffers())}
    shared |= {id(old): nn.Parameter(old.detach(), old.requires_grad) for old in module.parameters()}
    return copy.deepcopy(module, shared)


def copy_of(decoder: Decoder) -> Decoder:
    """A copy of a model that takes no memory, as `sharing_copy` makes it, and records no gradients."""
    return replace(decoder, model=sharing_copy(decoder.model).requires_grad_(False))


def keep_blocks(layer: DecoderLayer, kept: Sequence[str]) -> None:
    """Keeps these blocks of a decoder layer, in place.

    Raises:
        SurgeryError: none would be left, or there is no such block.
    """
    from optimum_prune.surgery.modeling_pruned import leave_out

    blocks = layer.blocks
    if not kept or not set(kept) <= set(blocks):
        raise SurgeryError(
            f"Of a layer's blocks, {', '.join(blocks)}, one at least must be kept, and no other. Leave out the whole layer instead."
        )
    for block in blocks:
        if block not in kept:
            leave_out(layer.module, block, layer.modules_of(block))


def keep(root: nn.Module, axis: Axis, kept: Units) -> None:
    """Keeps these units of an axis of a module, in place; where each group keeps its own, as many of each.

    Raises:
        SurgeryError: they are not units of this axis, there would be none, or not as many as a config can say.
    """
    each_group = [kept] if not kept or isinstance(kept[0], int) else kept
    if axis.groups and (len(each_group) != axis.groups or len({len(each) for each in each_group}) != 1):
        raise SurgeryError(f"As many {axis.units_are} must be kept of each of the {axis.groups} experts of a layer.")
    for each in each_group:
        _check(each, axis.units, axis.units_are)  # type: ignore[arg-type]  # one list of indices
    count = len(each_group[0])
    if axis.possible is not None and count != axis.units and count not in axis.possible:
        raise SurgeryError(
            f"{count} {axis.units_are} are to be kept, and the architecture allows {', '.join(map(str, axis.possible))} only."
        )
    chosen = torch.tensor(kept)
    places = defaultdict[int, list[str]](list)  # of each parameter, since some are tied
    for path, parameter in root.named_parameters(remove_duplicate=False):
        places[id(parameter)].append(path)
    by_path = {path: paths for paths in places.values() for path in paths}
    for member in axis.members:
        value = _kept(root, member, member.features(chosen, axis.units))
        for path in by_path.get(member.path, [member.path]):
            _put(root, path, value)


def _kept(root: nn.Module, member: Member, index: Tensor) -> Tensor:
    """A parameter or buffer with these features along its dimension."""
    parent, _, name = member.path.rpartition(".")
    old: Tensor = getattr(root.get_submodule(parent), name)
    index = index.to(old.device)
    if index.ndim == 2:  # a row for each group along the first dimension
        view = [1] * old.ndim
        view[0], view[member.dim] = index.shape
        shape = list(old.shape)
        shape[member.dim] = index.shape[1]
        value = old.detach().gather(member.dim, index.view(view).expand(shape))
    else:
        value = old.detach().index_select(member.dim, index)
    return nn.Parameter(value, old.requires_grad) if isinstance(old, nn.Parameter) else value


def _put(root: nn.Module, path: str, value: Tensor) -> None:
    """Puts a parameter or buffer in its place; what its module says of its sizes follows."""
    parent, _, name = path.rpartition(".")
    module = root.get_submodule(parent)
    setattr(module, name, value)
    if name == "weight" and value.ndim == 2:
        _follow_weight(module, value)


def _follow_weight(module: nn.Module, weight: Tensor) -> None:
    """Lets a module say the sizes of the weight that it has now."""
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = weight.shape
    elif isinstance(module, nn.Embedding):
        module.num_embeddings, module.embedding_dim = weight.shape
    elif hasattr(module, "nf"):  # a Conv1D of transformers
        module.nx, module.nf = weight.shape  # type: ignore[assignment]  # plain numbers, not submodules


def assign(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Gives parameters of a model, or of a part of one, new values of the same shape; dtype and device stay.

    Raises:
        SurgeryError: no such parameter, another shape, or a value that is not finite.
    """
    for name, value in weights.items():
        try:
            old = model.get_parameter(name)
        except AttributeError:
            raise SurgeryError(f"A new weight is meant for '{name}', which the model does not have.") from None
        if old.shape != value.shape:
            raise SurgeryError(f"The new '{name}' has shape {tuple(value.shape)}, the model's has {tuple(old.shape)}.")
        if not value.isfinite().all():
            raise SurgeryError(f"The new '{name}' has values that are not finite. Check the weights and the text.")
        # Not in place: the old values may be a file's.
        old.data = value.to(old.device, old.dtype, copy=True, memory_format=torch.contiguous_format)


def keep_layers(decoder: Decoder, kept: Sequence[int]) -> None:
    """Keeps these decoder layers, in place: the list, each `layer_idx`, and every config field that follows."""
    layers = decoder.modules
    _check(kept, len(layers), "decoder layers")
    survivors = [layers[index] for index in kept]
    decoder.put_layers(survivors)
    for position, layer in enumerate(survivors):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                setattr(module, "layer_idx", position)  # noqa: B010 - a plain attribute, not a submodule
    keep_layers_in_config(decoder.config, decoder.family, kept)


def _check(kept: Sequence[int], count: int, what: str) -> None:
    if not kept:
        raise SurgeryError(f"No {what} would be left. Remove fewer.")
    if list(kept) != sorted(set(kept)) or kept[0] < 0 or kept[-1] >= count:
        raise SurgeryError(f"The kept {what} must be distinct, in order, and within 0 to {count - 1}.")
