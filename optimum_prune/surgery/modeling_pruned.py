"""Causal language models whose decoder layers differ in shape, on top of the stock models of transformers.

A copy of this file lies beside the weights of such a checkpoint. So it loads without optimum-prune, by
`AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)`; after `import optimum_prune` no remote code is needed.

The `config.json` has a model type of its own, so that nothing takes it for a stock one. In it, `base_config` is that of the stock
architecture, and `pruned` says where the decoder layers are, which fields each has for itself, and which blocks it has not.
"""

from __future__ import annotations

import functools
import json
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MODEL_TYPE = "optimum_prune"
FILE = "modeling_pruned"
MODELS = ("AutoModelForCausalLM", "AutoModelForImageTextToText")
AUTO_MAP = {"AutoConfig": f"{FILE}.PrunedConfig", **dict.fromkeys(MODELS, f"{FILE}.PrunedForCausalLM")}
AROUND = ("quantization_config", "transformers_version")
"""Fields that a reader of `config.json` may look for at its top."""
HOW_TO_LOAD = "of base_config: load this model with trust_remote_code=True, or after `import optimum_prune`"
"""Stands at the top of `config.json` as the dtype. A stock class that is made to read it raises an error with these words in it,
where it would otherwise build a model of its default size with random weights."""
PATH = re.compile(r"[A-Za-z]\w*(\.[A-Za-z0-9]\w*)*")
"""Dotted names of modules: none that Python keeps for itself, and none that leads out."""
LONGEST_PATH = 200


class LayerConfig:
    """A config as one decoder layer sees it: some fields its own, everything else the model's."""

    def __init__(self, config: PreTrainedConfig, own: dict[str, Any]) -> None:
        self.__dict__.update(own, _config=config)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "_config" not in self.__dict__:
            raise AttributeError(name)
        stored = (getattr(self._config, "attribute_map", None) or {}).get(name, name)
        return self.__dict__[stored] if stored in self.__dict__ else getattr(self._config, name)


class Nothing(nn.Module):
    """Takes the place of a block that was left out, or of its last module: puts out zeros like the hidden states."""

    puts_out_nothing = True

    def __init__(self, block: str) -> None:
        super().__init__()
        self.block, self.layer_idx = block, -1

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What attention puts out has its weights beside it, of which there are none."""
        zeros = torch.zeros_like(args[0] if args else kwargs["hidden_states"])
        if self.block != "attention":
            return zeros
        for cache in (*args, *kwargs.values()):
            own = dict(enumerate(getattr(cache, "layers", ()))).get(self.layer_idx)
            if type(own).__name__ == "DynamicSlidingWindowLayer":  # it counts tokens, to be cropped with the others
                cache.update(*2 * [zeros[:, None, :, :0]], self.layer_idx)
        return zeros, None


def leave_out(layer: nn.Module, block: str, modules: Sequence[str]) -> None:
    """Leaves a block, attention or feed_forward, out of a decoder layer, in place; hidden states leave it by the last of its modules."""
    for path in modules[:-1]:
        layer.set_submodule(path, nn.Identity())
    layer.set_submodule(modules[-1], Nothing(block))


def sync_cache(layers: Any, attention: str, layer_types: Sequence[str] | None) -> None:
    """Sees to it that the length of a cache can be told where attentions were left out, in place.

    A model asks the cache of its first layer of each type how long it is. Where that layer has no attention, the next one of its
    type uses that cache.

    Raises:
        ValueError: there is none.
    """
    types = list(layer_types or [""] * len(layers))
    for kind in dict.fromkeys(types):
        of_kind = [index for index, found in enumerate(types) if found == kind]
        left = [index for index in of_kind if not hasattr(layers[index].get_submodule(attention), "puts_out_nothing")]
        if not left:
            raise ValueError(f"No attention of the type '{kind or 'attention'}' would be left, and caches need one.")
        uses = {of_kind[0]: left[0], left[0]: of_kind[0]}
        for index, module in ((i, each) for i in of_kind for each in layers[i].get_submodule(attention).modules()):
            if hasattr(module, "layer_idx"):
                module.layer_idx = uses.get(index, index)


class PrunedConfig(PreTrainedConfig):  # type: ignore[misc]  # not annotated
    """Reads the config of a pruned model: a config of its stock architecture that knows how its layers differ."""

    model_type = MODEL_TYPE

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """The config that a `config.json` describes; a ValueError if it is not as this file writes such."""
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

        base = config_dict.get("base_model_type")
        stock = CONFIG_MAPPING[base] if isinstance(base, str) and base in CONFIG_MAPPING else None
        _expect(stock in MODEL_FOR_CAUSAL_LM_MAPPING, f"is of {base!r}, which is no language model of transformers")
        return pruned_classes(stock)[0].from_dict(config_dict, **kwargs)  # type: ignore[arg-type]  # not None any more


class PrunedForCausalLM:
    """Makes pruned models; what it makes is a model of the stock architecture."""

    @classmethod
    def from_pretrained(cls, *args: Any, config: PreTrainedConfig, **kwargs: Any) -> Any:
        """A pruned model from its checkpoint."""
        return pruned_classes(type(config))[1].from_pretrained(*args, config=config, **kwargs)

    @classmethod
    def _from_config(cls, config: PreTrainedConfig, **kwargs: Any) -> Any:
        return pruned_classes(type(config))[1]._from_config(config, **kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoModelForCausalLM") -> None:
        """Pruned models save this file by themselves."""


class _ConfigOfPruned:
    """What the config of a pruned model adds to that of its stock architecture."""

    model_type = MODEL_TYPE

    @property
    def base_model_type(self) -> str:
        """The model type of the stock architecture."""
        return str(_stock(type(self)).model_type)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        if "base_config" in config_dict:
            _expect(isinstance(config_dict["base_config"], Mapping), "has no config of the stock architecture")
            _check(config_dict.get("pruned"))
            around = {name: config_dict[name] for name in (*AROUND, "pruned", "auto_map") if name in config_dict}
            config_dict = {**config_dict["base_config"], **around, "model_type": MODEL_TYPE}
        return super().from_dict(config_dict, **kwargs)  # type: ignore[misc]  # of the stock config

    def to_json_string(self, use_diff: bool = True) -> str:
        base = json.loads(super().to_json_string(use_diff))  # type: ignore[misc]  # likewise
        plain = {name: base.pop(name) for name in (*AROUND, "pruned") if name in base}
        base.pop("auto_map", None)
        stock = _stock(type(self))
        del base["model_type"]  # with it, a stock class would take this part for a config of its own
        base["architectures"] = [_stock(pruned_classes(stock)[1]).__name__]
        plain.update(base_model_type=stock.model_type, base_config=base)
        plain.update(architectures=["PrunedForCausalLM"], auto_map=AUTO_MAP, model_type=MODEL_TYPE, dtype=HOW_TO_LOAD)
        return json.dumps(plain, indent=2, sort_keys=True) + "\n"

    def to_json_file(self, json_file_path: Any, use_diff: bool = True) -> None:
        """Brings this file along with the config: where transformers saves that, and pushes what has been saved."""
        super().to_json_file(json_file_path, use_diff)  # type: ignore[misc]  # likewise
        beside = Path(json_file_path).parent / f"{FILE}.py"
        if Path(json_file_path).name == "config.json" and beside.resolve() != Path(__file__).resolve():
            shutil.copyfile(__file__, beside)


def _expect(holds: bool, otherwise: str) -> None:
    if not holds:
        raise ValueError(f"its 'pruned' {otherwise}")


def _check(pruned: Any) -> None:
    """Refuses what a config says of layers, with a ValueError, if it is anything but names of modules and fields, and sizes."""
    names = ("layers", "config", "blocks", "own")
    _expect(isinstance(pruned, Mapping) and set(names) <= set(pruned), f"does not say {', '.join(names)}")
    layers, config, blocks, own = (pruned[name] for name in names)
    listed = isinstance(blocks, Mapping) and all(isinstance(paths, list) and paths for paths in blocks.values())
    _expect(listed, "has blocks that are no lists of modules")
    for path in (layers, *([config] if config else []), *(path for paths in blocks.values() for path in paths)):
        plain = isinstance(path, str) and len(path) <= LONGEST_PATH and PATH.fullmatch(path)
        _expect(bool(plain), f"names {str(path)[:LONGEST_PATH]!r}, which is no path of a module")
    _expect(isinstance(own, list) and all(isinstance(each, Mapping) for each in own), "has no fields for each layer")
    for name, value in ((name, value) for each in own for name, value in each.items()):
        if name == "without":
            right = isinstance(value, list) and all(isinstance(block, str) and block in blocks for block in value)
        else:
            right = PATH.fullmatch(name) is not None and "." not in name and type(value) is int and value > 0
        _expect(right, f"has {name!r}: {str(value)[:LONGEST_PATH]} of a layer, which it cannot have")


def _found(root: Any, path: str, kind: type) -> Any:
    """What is at a dotted path, which leads through modules of a model only, or through configs of a config; else a ValueError."""
    for name in filter(None, path.split(".")):
        root = (root._modules if isinstance(root, nn.Module) else vars(root)).get(name)
        _expect(isinstance(root, (nn.Module, PreTrainedConfig)), f"names '{path}', where nothing is")
    _expect(isinstance(root, kind), f"names '{path}', which is no {kind.__name__}")
    return root


class _ModelOfPruned:
    """What a pruned model adds to its stock architecture."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]  # of the stock model
        shapes = config.pruned
        _check(shapes)
        text = _found(config, shapes["config"], PreTrainedConfig)
        layers = _found(self, shapes["layers"], nn.ModuleList)
        _expect(len(layers) == len(shapes["own"]), f"is of {len(shapes['own'])} layers, and there are {len(layers)}")
        for index, own in enumerate(shapes["own"]):
            for name in own:
                _expect(name == "without" or hasattr(text, name), f"has '{name}' of a layer, which is no field")
            if own:
                layers[index] = type(layers[index])(LayerConfig(text, own), index)
            for block in own.get("without", ()):
                for path in shapes["blocks"][block]:
                    _found(layers[index], path, nn.Module)
                leave_out(layers[index], block, shapes["blocks"][block])
        if any("without" in own for own in shapes["own"]):
            sync_cache(layers, shapes["blocks"]["attention"][-1], getattr(text, "layer_types", None))

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("save_original_format", False)  # older names of weights are not for this model type
        super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]  # likewise


def pruned_classes(base: type[PreTrainedConfig]) -> tuple[type[PreTrainedConfig], type[PreTrainedModel]]:
    """The classes of config and model for pruned models of an architecture, from its stock config's class or from theirs.

    Raises:
        KeyError: transformers has no causal language model with such a config.
    """
    return _pruned_classes(_stock(base) if issubclass(base, _ConfigOfPruned) else base)  # type: ignore[arg-type]  # a class


@functools.cache
def _pruned_classes(base: type) -> tuple[Any, Any]:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    model = MODEL_FOR_CAUSAL_LM_MAPPING[base]
    config = type(f"Pruned{base.__name__}", (_ConfigOfPruned, base), {"__module__": __name__})
    asked = {name: getattr(model, name) for name in dir(model) if name.startswith("_can_set_")}  # not of this code
    own = {"__module__": __name__, "config_class": config, **asked}
    kind = type(f"Pruned{model.__name__}", (_ModelOfPruned, model), own)
    for auto in (getattr(transformers, name) for name in MODELS):
        if base in auto._model_mapping:
            auto.register(config, kind, exist_ok=True)
    return config, kind


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
    model.config.__class__, model.__class__ = pruned_classes(type(model.config))
    model.config.pruned = {"layers": layers, "config": config, "blocks": blocks, "own": own}
    model.config.auto_map = dict(AUTO_MAP)


def to_stock(model: Any) -> None:
    """Makes a pruned model whose layers are all alike again a stock one, in place; a stock model stays as it is."""
    if issubclass(type(model), _ModelOfPruned):
        model.config.__class__, model.__class__ = _stock(type(model.config)), _stock(type(model))
        del model.config.pruned, model.config.auto_map


def __getattr__(name: str) -> Any:
    """The classes made here, by their names: so objects of them can be pickled."""
    stock = getattr(transformers, name.removeprefix("Pruned"), None) if name.startswith("Pruned") else None
    if not isinstance(stock, type):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")  # noqa: TRY004 - as of any module
    config = getattr(stock, "config_class", None) or stock
    return pruned_classes(config)[0 if stock is config else 1]


def _stock(kind: type) -> Any:
    """The class of the stock architecture that a class made here is on top of."""
    return kind.__mro__[2]
