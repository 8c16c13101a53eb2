"""Causal language models whose decoder layers differ in shape, on top of the stock models of transformers.

A copy of this file lies beside the weights of such a checkpoint, with that of `configuration_pruned.py`, which says how it is loaded.
"""

from __future__ import annotations

import copy
import functools
import sys
from collections.abc import Sequence
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .configuration_pruned import (
    MODEL_TYPE,
    LayerConfig,
    OfPruned,
    check,
    expect,
    pruned_config,
    stock_models,
    stock_named,
    stock_of,
    swapped_caches,
)

GROWING = ("DynamicLayer", "DynamicSlidingWindowLayer")
"""Caches of a layer that grow by what they are given."""


class Nothing(nn.Module):
    """Takes the place of a block that was left out, or of its last module: puts out zeros like the hidden states."""

    puts_out_nothing = True

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Zeros; while training, such that the norm in front has gradients, of zeros: distributed training waits for those of all parameters."""
        hidden = args[0] if args else kwargs["hidden_states"]
        return hidden * 0 if hidden.requires_grad and torch.is_grad_enabled() else torch.zeros_like(hidden)


class NoAttention(Nothing):
    """The same in place of an attention: what that puts out has its weights beside it, of which there are none."""

    attends = False

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config, self.layer_idx = config, -1

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Zeros, and no weights."""
        zeros = super().forward(*args, **kwargs)
        if self.attends:  # never: vLLM looks for this call in every layer, and makes a cache for it
            attend = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
            return attend(self, zeros, zeros, zeros, None)
        for cache in (*args, *kwargs.values()):
            own = dict(enumerate(getattr(cache, "layers", ()))).get(self.layer_idx)
            if type(own).__name__ in GROWING:  # it counts tokens, to be cropped with the others
                cache.update(*2 * [zeros[:, None, :, :0]], self.layer_idx)
        return zeros, None


def leave_out(layer: nn.Module, block: str, modules: Sequence[str]) -> None:
    """Leaves a block, attention or feed_forward, out of a decoder layer, in place; hidden states leave it by the last of its modules."""
    for path in modules[:-1]:
        layer.set_submodule(path, nn.Identity())
    config = getattr(layer.get_submodule(modules[-1]), "config", None)
    layer.set_submodule(modules[-1], NoAttention(config) if block == "attention" else Nothing())


def sync_cache(layers: Any, attention: str, layer_types: Sequence[str] | None) -> None:
    """Sees to it that the length of a cache can be told where attentions were left out, in place.

    Raises:
        ValueError: none of a type is left.
    """
    attentions = [layer.get_submodule(attention) for layer in layers]
    swapped = swapped_caches([not hasattr(each, "puts_out_nothing") for each in attentions], layer_types)
    for index, module in ((index, each) for index, one in enumerate(attentions) for each in one.modules()):
        if hasattr(module, "layer_idx"):
            module.layer_idx = swapped.get(index, index)


def _found(root: Any, path: str, kind: type) -> Any:
    """What is at a dotted path, which leads through modules of a model only, or through configs of a config; else a ValueError."""
    for name in filter(None, path.split(".")):
        root = (root._modules if isinstance(root, nn.Module) else vars(root)).get(name)
        expect(isinstance(root, (nn.Module, PreTrainedConfig)), f"names '{path}', where nothing is")
    expect(isinstance(root, kind), f"names '{path}', which is no {kind.__name__}")
    return root


class _ModelOfPruned(OfPruned):
    """What a pruned model adds to its stock architecture."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]  # of the stock model
        shapes = config.pruned
        check(shapes)
        text = _found(config, shapes["config"], PreTrainedConfig)
        layers = _found(self, _below(self, shapes["layers"]), nn.ModuleList)
        expect(len(layers) == len(shapes["own"]), f"is of {len(shapes['own'])} layers, and there are {len(layers)}")
        for index, own in enumerate(shapes["own"]):
            for name in own:
                expect(name == "without" or hasattr(text, name), f"has '{name}' of a layer, which is no field")
            if own:
                layers[index] = type(layers[index])(LayerConfig(text, own), index)
            for block in own.get("without", ()):
                for path in shapes["blocks"][block]:
                    _found(layers[index], path, nn.Module)
                leave_out(layers[index], block, shapes["blocks"][block])
        if any("without" in own for own in shapes["own"]):
            sync_cache(layers, shapes["blocks"]["attention"][-1], getattr(text, "layer_types", None))
        _tell_peft(stock_of(type(config)).model_type)

    def _get_name(self) -> str:
        """By this name transformers' Trainer knows whether labels are to be shifted."""
        return str(stock_of(type(self)).__name__)

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("save_original_format", False)  # older names of weights are not for this model type
        super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]  # likewise


def _below(model: Any, path: str) -> str:
    """The path of a model's layers, which is told of one with a head."""
    prefix = f"{model.base_model_prefix}."
    return path if hasattr(model, model.base_model_prefix) else path.removeprefix(prefix)


def _tell_peft(base: str) -> None:
    """Lets PEFT, if it is there already, adapt in pruned models what it adapts in those of their architecture."""
    constants = sys.modules.get("peft.utils.constants")
    for name, by_type in vars(constants).items() if constants else ():
        if name.startswith("TRANSFORMERS_MODELS_TO_") and isinstance(by_type, dict) and base in by_type:
            by_type[MODEL_TYPE] = by_type[base]


@functools.cache
def register(stock: Any) -> None:
    """Lets transformers know the pruned models of an architecture.

    Args:
        stock: the class of the stock config.

    Raises:
        KeyError: transformers has no causal language model with such a config.
    """
    models = stock_models(stock)
    if "AutoModelForCausalLM" not in models:
        raise KeyError(stock)
    for auto, kind in models.items():
        made = pruned_model(kind, stock)
        getattr(transformers, auto).register(made.config_class, made, exist_ok=True)
        setattr(transformers, made.__name__, made)  # there, libraries look for what a config has as architecture


@functools.cache
def pruned_model(kind: Any, stock: Any) -> Any:
    """The class of pruned models of a stock class, whose config is of this stock class."""
    asked = {name: getattr(kind, name) for name in dir(kind) if name.startswith("_can_set_")}  # not of this code
    own = {"__module__": __name__, "config_class": pruned_config(stock), **asked}
    return type(f"Pruned{kind.__name__}", (_ModelOfPruned, kind), own)


def to_heterogeneous(
    model: PreTrainedModel, layers: str, config: str, blocks: dict[str, list[str]], own: list[dict[str, Any]]
) -> None:
    """Makes a stock model, whose layers were cut already, a pruned one that can be saved; in place.

    Args:
        layers: path of its decoder layers.
        config: path from its config to that of the decoder, empty if they are the same.
        blocks: paths of the modules that make up attention and FFN of a layer.
        own: fields of the config that each layer has for itself, and `without`, the blocks that it has not.

    Raises:
        KeyError: it is no stock model.
    """
    stock = stock_of(type(model.config))
    register(stock)
    model.__class__ = pruned_model(stock_of(type(model)), stock)
    model.config.__class__ = pruned_config(stock)
    model.config.pruned = {"layers": layers, "config": config, "blocks": blocks, "own": own}
    model.config.architectures = [type(model).__name__]


def to_stock(model: Any) -> None:
    """Makes a pruned model whose layers are all alike again a stock one, in place; a stock model stays as it is."""
    if issubclass(type(model), OfPruned):
        _forget_layers(model.config, stock_of(type(model)))
        model.__class__ = stock_of(type(model))


def stock_config(model: Any) -> Any:
    """The config of a stock model all of whose layers are as large as the largest of a pruned one."""
    config = copy.deepcopy(model.config)
    _forget_layers(config, stock_of(type(model)))
    return config


def _forget_layers(config: Any, kind: type) -> None:
    """Makes the config of a pruned model that of a stock one, in place.

    Args:
        kind: the class of that model.
    """
    config.__class__ = stock_of(type(config))
    del config.pruned
    vars(config).pop("auto_map", None)
    config.architectures = [kind.__name__]


def __getattr__(name: str) -> Any:
    """The classes made here, by their names: so objects of them can be pickled."""
    stock = stock_named(name, __name__)
    return pruned_model(stock, stock.config_class)
