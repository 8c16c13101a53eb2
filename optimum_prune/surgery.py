"""The only module that changes a shape or a config."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from optimum_prune.anatomy import Family, FeedForward, Linear, features_of
from optimum_prune.cuts import BLOCKS, PARTS, Cuts, Decision
from optimum_prune.errors import SurgeryError, reason

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


def carry_out(model: PreTrainedModel, family: Family, decision: Decision) -> None:
    """Cuts a model in place as decided: heads and channels, then new weights, then layers.

    The config is left to `settle`, since a pass may decide one layer at a time.

    Raises:
        SurgeryError: the decision names a layer, head, channel or parameter that is not there, or would leave nothing.
    """
    layers, text = family.layers_of(model), family.text_config(model.config)
    for part in PARTS:
        for index in getattr(decision.cuts, part):
            if not 0 <= index < len(layers):
                raise SurgeryError(
                    f"{part.capitalize()} of layer {index} are to be cut, but the model has layers 0 to {len(layers) - 1}."
                )
    for index in sorted({index for part in PARTS for index in getattr(decision.cuts, part)}):
        cut_layer(layers[index], family, decision.cuts, index, text)
    assign(model, decision.weights)
    if decision.cuts.layers is not None:
        keep_layers(model, family, decision.cuts.layers)


def cut_layer(layer: nn.Module, family: Family, cuts: Cuts, index: int, config: PreTrainedConfig) -> None:
    """Makes of a decoder layer, in place, what the cuts say of the layer `index`; given the config of the decoder."""
    if index in cuts.blocks:
        keep_blocks(layer, family, cuts.blocks[index])
    if index in cuts.heads:
        keep_heads(layer, family, cuts.heads[index])
        follow_config(layer, family, index, config)  # attention may ask its config for their number
    if index in cuts.channels:
        keep_channels(layer, family, cuts.channels[index])
    if index in cuts.experts:
        keep_expert_channels(layer, family, cuts.experts[index])
    if index in cuts.shared:
        if family.experts is None or family.experts.shared is None:
            raise SurgeryError(f"Family '{family.name}' has no shared experts to cut.")
        keep_channels(layer, family, cuts.shared[index], family.experts.shared)


def changed_layer(model: PreTrainedModel, family: Family, decision: Decision, index: int) -> nn.Module:
    """A copy of a decoder layer on which what a decision says of it is carried out; the model stays.

    What the decision does not change takes no memory: surgery puts new values in place of old ones, and never overwrites them.
    """
    config, original = family.text_config(model.config), family.layers_of(model)[index]
    shared = {id(old): nn.Parameter(old.detach(), old.requires_grad) for old in original.parameters()}
    layer = copy.deepcopy(original, {id(config): config, **shared})
    cut_layer(layer, family, decision.cuts, index, config)
    prefix = f"{family.layers}.{index}."
    assign(layer, {name.removeprefix(prefix): value for name, value in decision.weights.items()})
    return layer


def keep_blocks(layer: nn.Module, family: Family, kept: Sequence[str]) -> None:
    """Keeps these blocks of a decoder layer, in place.

    Raises:
        SurgeryError: none would be left, or there is no such block.
    """
    from optimum_prune.modeling_pruned import leave_out

    blocks = family.blocks_of(layer)
    if not kept or not set(kept) <= set(blocks):
        raise SurgeryError(
            f"Of a layer's blocks, {', '.join(blocks)}, one at least must be kept, and no other. Leave out the whole layer instead."
        )
    for block in blocks:
        if block not in kept:
            leave_out(layer, block, family.block_modules(block))


def keep_channels(
    layer: nn.Module, family: Family, kept: Sequence[int], feed_forward: FeedForward | None = None
) -> None:
    """Keeps these FFN channels of a decoder layer, in place; of its shared experts, if their description is given."""
    feed_forward = feed_forward or family.feed_forward
    output = family.linear(layer, feed_forward.output)
    width = output.weight.shape[1]
    _check(kept, width, "channels of the FFN")
    rows = torch.cat([torch.tensor(kept) + part * width for part in range(feed_forward.parts)])
    for path in feed_forward.inputs:
        _keep_rows(family.linear(layer, path), rows)
    _keep_columns(output, torch.tensor(kept))


def keep_expert_channels(layer: nn.Module, family: Family, kept: Sequence[Sequence[int]]) -> None:
    """Keeps these channels of each expert of a decoder layer, as many of each, in place."""
    experts = family.experts_of(layer)
    if experts is None or family.experts is None:
        raise SurgeryError(f"Family '{family.name}' has no experts in this layer to cut.")
    inputs, output = (cast(Tensor, getattr(experts, name)) for name in (family.experts.inputs, family.experts.output))
    if len(kept) != len(output) or len({len(each) for each in kept}) != 1:
        raise SurgeryError(f"As many channels must be kept of each of the {len(output)} experts of a layer.")
    for each in kept:
        _check(each, output.shape[2], "channels of an expert")
    columns = torch.tensor([list(each) for each in kept], device=output.device)
    rows = torch.cat([columns, columns + output.shape[2]], dim=1)
    for name, weight, index in (
        (family.experts.inputs, inputs, rows[:, :, None].expand(-1, -1, inputs.shape[2])),
        (family.experts.output, output, columns[:, None].expand(-1, output.shape[1], -1)),
    ):
        dim = 1 if weight is inputs else 2
        cut = nn.Parameter(weight.detach().gather(dim, index), requires_grad=weight.requires_grad)
        setattr(experts, name, cut)


def keep_heads(layer: nn.Module, family: Family, kept: Sequence[int]) -> None:
    """Keeps these key-value heads of a decoder layer, each with the query heads that share it, in place.

    Raises:
        SurgeryError: the config could not say it.
    """
    if family.heads is None:
        raise SurgeryError(
            f"The config of family '{family.name}' cannot say that a layer has fewer heads of the same size. Cut its channels only."
        )
    output = family.linear(layer, family.attention_output)
    heads, queries, size = family.head_counts(layer)
    _check(kept, heads, "key-value heads")
    rows = {role: features_of(kept, size * (queries if role == "query" else 1)) for role in ("query", "key", "value")}
    lengths = {role: size * heads * (queries if role == "query" else 1) for role in rows}
    for path, roles in family.heads.inputs.items():
        starts = [sum(lengths[before] for before in roles[:position]) for position in range(len(roles))]
        stacked = torch.cat([start + rows[role] for start, role in zip(starts, roles, strict=True)])
        _keep_rows(family.linear(layer, path), stacked)
    for path, role in family.heads.norms.items():
        if (weight := family.head_norm(layer, path)) is not None:
            index = features_of(kept, queries if role == "query" else 1).to(weight.device)
            cut = nn.Parameter(weight.detach().index_select(0, index), requires_grad=weight.requires_grad)
            setattr(layer.get_submodule(path), "weight", cut)  # noqa: B010 - a parameter of a module
    _keep_columns(output, rows["query"])


def _keep_rows(linear: Linear, rows: Tensor) -> None:
    index = rows.to(linear.weight.device)
    bias = None if linear.bias is None else linear.bias.index_select(0, index)
    linear.replace(linear.weight.index_select(0, index), bias)


def _keep_columns(linear: Linear, columns: Tensor) -> None:
    linear.replace(linear.weight.index_select(1, columns.to(linear.weight.device)), None)


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


def keep_layers(model: PreTrainedModel, family: Family, kept: Sequence[int]) -> None:
    """Keeps these decoder layers, in place: the list, each `layer_idx`, and every config field that follows."""
    layers = family.layers_of(model)
    _check(kept, len(layers), "decoder layers")
    survivors = nn.ModuleList([layers[index] for index in kept])
    family.put_layers(model, survivors)
    for position, layer in enumerate(survivors):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                setattr(module, "layer_idx", position)  # noqa: B010 - a plain attribute, not a submodule
    _keep_layers_in_config(family.text_config(model.config), family, kept)


def _keep_layers_in_config(config: PreTrainedConfig, family: Family, kept: Sequence[int]) -> None:
    depth = getattr(config, family.depth)
    for field in family.per_layer:
        entries = getattr(config, field, None)
        if entries is None:
            continue
        if len(entries) != depth:
            raise SurgeryError(
                f"The config lists {len(entries)} entries in '{field}' for {depth} decoder layers, so it is unclear "
                f"which belong to the kept ones. Mend the config first."
            )
        setattr(config, field, [entries[index] for index in kept])
    for field in family.thresholds:
        if getattr(config, field, None) is not None:
            setattr(config, field, sum(index < getattr(config, field) for index in kept))
    for field, exceptions in family.strides.items():
        # Which layers are set apart has no period any more: from now on all are but those on the list.
        apart = [(index + 1) % getattr(config, field) == 0 for index in range(depth)]
        listed = set(getattr(config, exceptions) or ())
        plain = [position for position, index in enumerate(kept) if index in listed or not apart[index]]
        setattr(config, exceptions, plain)
        setattr(config, field, 1)
    setattr(config, family.depth, len(kept))


def settle(model: PreTrainedModel, family: Family) -> None:
    """Makes the config say the sizes that the layers have.

    Where layers differ, each gets a config of its own, and the model becomes one that saves itself in a form that says so.

    Raises:
        SurgeryError: the config cannot say it.
    """
    from optimum_prune.modeling_pruned import dress, settle_cache, undress

    text, layers = family.text_config(model.config), family.layers_of(model)
    fields = [family.fields(layer) for layer in layers]
    common = {name: max(own[name] for own in fields if name in own) for name in {}.fromkeys(chain(*fields))}
    owned: list[dict[str, Any]] = [
        {name: value for name, value in own.items() if value != common[name]} for own in fields
    ]
    for layer, own in zip(layers, owned, strict=True):
        if missing := [block for block in BLOCKS if block not in family.blocks_of(layer)]:
            own["without"] = missing
    changed = any(getattr(text, name) != value for name, value in common.items())
    undress(model)
    if not changed and not any(owned):
        return
    for layer, own in zip(layers, fields, strict=True):
        for name, value in _head_size(family, layer, text, own).items():
            setattr(text, name, value)
    for name, value in common.items():
        setattr(text, name, value)
    if any(owned):
        try:
            blocks = {block: list(family.block_modules(block)) for block in BLOCKS}
            dress(model, family.layers, family.config, blocks, owned)
        except KeyError:
            raise SurgeryError(
                f"The layers of {type(model).__name__} would differ in shape, which can be saved for architectures of transformers "
                f"only. Keep the same sizes in every layer."
            ) from None
    for index, layer in enumerate(layers):
        follow_config(layer, family, index, text)
    if any("without" in own for own in owned):
        try:
            settle_cache(layers, family.attention, getattr(text, "layer_types", None))
        except ValueError as error:
            raise SurgeryError(f"{error} Remove fewer attentions.") from error


def _head_size(
    family: Family, layer: nn.Module, config: PreTrainedConfig, fields: Mapping[str, int]
) -> dict[str, int]:
    """What a config has to say of the size of a head where a layer has not as many heads as it says; else nothing."""
    name = "" if family.heads is None else family.heads.query_heads
    if fields.get(name) in (None, getattr(config, name, None)):
        return {}
    return {"head_dim": family.head_counts(layer).size}


def follow_config(layer: nn.Module, family: Family, index: int, text: PreTrainedConfig) -> None:
    """Lets a decoder layer that was cut read its config anew: what its modules hold of it follows.

    Args:
        index: its position.
        text: the config of the decoder; where this layer has other sizes, it gets a config of its own.

    Raises:
        SurgeryError: a layer made from that config would have other parameters.
    """
    from optimum_prune.modeling_pruned import LayerConfig

    fields = family.fields(layer)
    own = {name: value for name, value in fields.items() if getattr(text, name) != value}
    own |= _head_size(family, layer, text, fields)
    config = LayerConfig(text, own) if own else text
    try:
        with torch.device("meta"):
            afresh = type(layer)(config, index)
    except Exception as error:  # whatever an architecture makes of sizes that it does not expect
        raise SurgeryError(f"{type(layer).__name__} cannot be made with {own}: {reason(error)}") from error
    for name, module in layer.named_modules():
        for field, value in vars(afresh.get_submodule(name)).items():
            if not hasattr(module, field):  # of a block that is not there
                continue
            if field == "config" or (isinstance(value, int) and not isinstance(value, bool)):
                setattr(module, field, config if field == "config" else value)
    for name, parameter in layer.named_parameters():
        if afresh.get_parameter(name).shape != parameter.shape:
            raise SurgeryError(
                f"The config can say {own}, but then '{name}' of layer {index} has the shape {tuple(afresh.get_parameter(name).shape)}, "
                f"not {tuple(parameter.shape)}. Please report it with the architecture."
            )


def _check(kept: Sequence[int], count: int, what: str) -> None:
    if not kept:
        raise SurgeryError(f"No {what} would be left. Remove fewer.")
    if list(kept) != sorted(set(kept)) or kept[0] < 0 or kept[-1] >= count:
        raise SurgeryError(f"The kept {what} must be distinct, in order, and within 0 to {count - 1}.")
