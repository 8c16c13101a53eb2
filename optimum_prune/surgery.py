"""The only module that changes a shape or a config."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from optimum_prune.anatomy import Family, Shape
from optimum_prune.cuts import Decision
from optimum_prune.errors import SurgeryError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


def carry_out(model: PreTrainedModel, family: Family, decision: Decision) -> None:
    """Cuts a model in place as decided: channels, then new weights, then layers.

    The config's width is left to `settle_width`, since a pass may decide one layer at a time.

    Raises:
        SurgeryError: the decision names a layer, channel or parameter that is not there, or would leave nothing.
    """
    layers = family.layers_of(model)
    for index, kept in decision.cuts.channels.items():
        if not 0 <= index < len(layers):
            raise SurgeryError(
                f"Channels of layer {index} are to be cut, but the model has layers 0 to {len(layers) - 1}."
            )
        keep_channels(layers[index], family, kept)
    assign(model, decision.weights)
    if decision.cuts.layers is not None:
        keep_layers(model, family, decision.cuts.layers)


def keep_channels(layer: nn.Module, family: Family, kept: Sequence[int]) -> None:
    """Keeps these FFN channels of a decoder layer, in place."""
    width = family.width_of(layer)
    _check(kept, width, "channels of the FFN")
    channels = torch.tensor(kept)
    rows = torch.cat([channels + part * width for part in range(family.feed_forward.parts)])
    for path in family.feed_forward.inputs:
        linear = family.linear(layer, path)
        index = rows.to(linear.weight.device)
        bias = None if linear.bias is None else linear.bias.index_select(0, index)
        linear.replace(linear.weight.index_select(0, index), bias)
    output = family.linear(layer, family.feed_forward.output)
    output.replace(output.weight.index_select(1, channels.to(output.weight.device)), None)


def assign(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Gives parameters new values of the same shape; dtype and device stay those of the model.

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
        with torch.no_grad():
            old.copy_(value)


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
    setattr(config, family.depth, len(kept))


def settle_width(model: PreTrainedModel, family: Family) -> None:
    """Makes the config say the FFN width that the layers have.

    Raises:
        SurgeryError: the layers have different widths, which a stock config cannot say.
    """
    widths = {family.width_of(layer) for layer in family.layers_of(model)}
    if len(widths) > 1:
        raise SurgeryError(
            f"The layers have FFN widths from {min(widths)} to {max(widths)}, and the config of a stock checkpoint holds "
            f"one width for all. Keep the same number of channels in every layer."
        )
    setattr(family.text_config(model.config), family.feed_forward.width, widths.pop())


def reshaped(config: PreTrainedConfig, family: Family, shape: Shape) -> PreTrainedConfig:
    """A copy of a config that describes another shape; of fewer layers, the first ones stand for those that stay."""
    new = copy.deepcopy(config)
    text = family.text_config(new)
    _keep_layers_in_config(text, family, range(shape.layers))
    setattr(text, family.feed_forward.width, shape.width)
    return new


def _check(kept: Sequence[int], count: int, what: str) -> None:
    if not kept:
        raise SurgeryError(f"No {what} would be left. Remove fewer.")
    if list(kept) != sorted(set(kept)) or kept[0] < 0 or kept[-1] >= count:
        raise SurgeryError(f"The kept {what} must be distinct, in order, and within 0 to {count - 1}.")
