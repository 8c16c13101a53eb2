"""The only module that changes a config: what it says follows the layers, and what modules hold of it follows the config."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from optimum_prune.anatomy.axis import Axis
from optimum_prune.anatomy.decoder import Decoder, DecoderLayer
from optimum_prune.anatomy.family import Family
from optimum_prune.anatomy.shape import BLOCKS
from optimum_prune.errors import SurgeryError, reason
from optimum_prune.surgery.norms import idle_norms

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def keep_layers_in_config(config: PreTrainedConfig, family: Family, kept: Sequence[int]) -> None:
    """Lets every field of a config that depends on the number or the order of decoder layers follow the kept ones.

    Raises:
        SurgeryError: a list of the config has not one entry for each layer.
    """
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


def sync_config(decoder: Decoder) -> None:
    """Makes the config say the sizes that the layers have.

    Where layers differ, each gets a config of its own, and the model becomes one that saves itself in a form that says so.

    Raises:
        SurgeryError: the config cannot say it.
    """
    from optimum_prune.surgery.modeling_pruned import sync_cache, to_stock

    text, layers = decoder.config, decoder.layers
    fields = [layer.fields() for layer in layers]
    common = {name: max(own[name] for own in fields if name in own) for name in {}.fromkeys(chain(*fields))}
    owned = [_own_fields(layer, own, common) for layer, own in zip(layers, fields, strict=True)]
    changed = any(getattr(text, name) != value for name, value in common.items())
    to_stock(decoder.model)
    if not changed and not any(owned):
        return
    for name, value in {**_pinned(layers, text), **common}.items():
        setattr(text, name, value)
    if any(owned):
        _make_heterogeneous(decoder, owned)
    for layer in decoder.layers:  # of the config as it is now
        follow_config(layer)
    if any("without" in own for own in owned):
        try:
            sync_cache(decoder.modules, decoder.family.attention, getattr(text, "layer_types", None))
        except ValueError as error:
            raise SurgeryError(f"{error} Remove fewer attentions.") from error


def _own_fields(layer: DecoderLayer, fields: Mapping[str, int], common: Mapping[str, int]) -> dict[str, Any]:
    """What the config has to say of one layer only."""
    own: dict[str, Any] = {name: value for name, value in fields.items() if value != common[name]}
    if missing := [block for block in BLOCKS if block not in layer.blocks]:
        own["without"] = missing
    return own


def _pinned(layers: Sequence[DecoderLayer], config: PreTrainedConfig) -> dict[str, int]:
    return {name: value for layer in layers for name, value in layer.pinned(config).items()}


def _make_heterogeneous(decoder: Decoder, owned: list[dict[str, Any]]) -> None:
    """Makes a model one whose layers have fields of the config for themselves."""
    from optimum_prune.surgery.modeling_pruned import to_heterogeneous

    family, first = decoder.family, decoder.layer(0)
    try:
        blocks = {block: [*_norms_out(decoder, block), *first.modules_of(block)] for block in BLOCKS}
        to_heterogeneous(decoder.model, family.layers, family.config, blocks, owned)
    except KeyError:
        raise SurgeryError(
            f"The layers of {type(decoder.model).__name__} would differ in shape, which can be saved for architectures of transformers "
            f"only. Keep the same sizes in every layer."
        ) from None


def _norms_out(decoder: Decoder, block: str) -> list[str]:
    """Takes out of the layers without a block the norms that belong to it, in place, and returns their paths."""
    without = [layer for layer in decoder.layers if block not in layer.blocks]
    there = [layer for layer in without if len(layer.blocks) == len(BLOCKS) - 1]
    gone = (
        [name for name, child in there[0].module.named_children() if isinstance(child, nn.Identity)] if there else []
    )
    paths = [path for path in gone if path not in there[0].modules_of(block)]
    paths += idle_norms(there[0]) if there else []
    for layer in without:
        for path in paths:
            layer.module.set_submodule(path, nn.Identity())
    return paths


def follow_config(layer: DecoderLayer) -> None:
    """Lets a decoder layer that was cut read its config anew: what its modules hold of it follows.

    Where the layer has other sizes than the config of the decoder says, it gets a config of its own.

    Raises:
        SurgeryError: a layer made from that config would have other parameters.
    """
    from optimum_prune.surgery.configuration_pruned import LayerConfig

    text = layer.config
    own = {name: value for name, value in layer.fields().items() if getattr(text, name) != value} | layer.pinned(text)
    config = LayerConfig(text, own) if own else text
    try:
        with torch.device("meta"):
            afresh = type(layer.module)(config, layer.index)
    except Exception as error:  # whatever an architecture makes of sizes that it does not expect
        raise SurgeryError(f"{type(layer.module).__name__} cannot be made with {own}: {reason(error)}") from error
    for name, module in layer.module.named_modules():
        _adopt(module, afresh.get_submodule(name), (int,))
        if hasattr(module, "config"):
            module.config = config
    for name, parameter in layer.module.named_parameters():
        if afresh.get_parameter(name).shape != parameter.shape:
            raise SurgeryError(
                f"The config cannot say how layer {layer.index} was cut: by it, '{name}' has the shape "
                f"{tuple(afresh.get_parameter(name).shape)}, not {tuple(parameter.shape)}. Cut all axes that one of its fields counts."
            )


def follow_hidden(decoder: Decoder, axis: Axis, units: int) -> None:
    """Makes the config say another size of the hidden states; what all modules hold of it follows.

    Raises:
        SurgeryError: a model made from that config would have other parameters.
    """
    from accelerate import init_empty_weights

    text = decoder.config
    _say_features(text, axis, units)
    try:
        with init_empty_weights(include_buffers=False):
            afresh = type(decoder.model)(copy.deepcopy(decoder.model.config))
    except Exception as error:  # whatever an architecture makes of sizes that it does not expect
        raise SurgeryError(
            f"{type(decoder.model).__name__} cannot be made with {units} features: {reason(error)}"
        ) from error
    layers = f"{decoder.family.layers}."
    for name, module in decoder.model.named_modules():
        if not name.startswith(layers):
            found = afresh.get_submodule(name)
            _adopt(module, found, (int, float, tuple))
            for buffer, value in found.named_buffers(recurse=False):
                if buffer in module._non_persistent_buffers_set and getattr(module, buffer).shape == value.shape:
                    getattr(module, buffer).copy_(value)
    for layer in decoder.layers:
        for name, module in layer.module.named_modules():  # norms know what they divide by
            _adopt(module, afresh.get_submodule(f"{layer.prefix}{name}".rstrip(".")), (tuple,))
        follow_config(layer)


def follow_features(layer: DecoderLayer, axis: Axis, units: int) -> None:
    """Lets the modules of a decoder layer know how many features of hidden states they have; the config stays as it is."""
    config = copy.copy(layer.config)
    _say_features(config, axis, units)
    with torch.device("meta"):
        afresh = type(layer.module)(config, layer.index)
    for name, module in layer.module.named_modules():
        for attribute, value in vars(afresh.get_submodule(name)).items():
            held = getattr(module, attribute, None)
            if (held, value) in ((axis.units, units), ((axis.units,), (units,))):
                setattr(module, attribute, value)


def _say_features(config: PreTrainedConfig, axis: Axis, units: int) -> None:
    """Makes a config say another size of the hidden states, and what it would compute from that."""
    for name, value in {**axis.pinned, **{name: units * times for name, times in axis.fields.items()}}.items():
        setattr(config, name, value)


def _adopt(module: nn.Module, afresh: nn.Module, kinds: tuple[type, ...]) -> None:
    """Takes over the plain attributes of a module that was made anew, if they are of these kinds."""
    for name, value in vars(afresh).items():
        if hasattr(module, name) and isinstance(value, kinds) and not isinstance(value, bool):
            setattr(module, name, value)
