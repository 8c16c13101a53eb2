"""Configs of models whose decoder layers differ in shape, on top of the stock configs of transformers.

A copy of this file lies beside the weights of such a checkpoint, as does one of `modeling_pruned.py`. So it loads without optimum-prune, by
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
from typing import Any

import transformers

try:
    from transformers import PreTrainedConfig
except ImportError:
    raise ImportError(
        f"This model's layers differ in shape, which needs transformers 5.6 or later, and this is {transformers.__version__}. Upgrade it."
    ) from None

MODEL_TYPE = "optimum_prune"
FILES = ("configuration_pruned", "modeling_pruned")
AUTO_CLASSES = (
    "AutoModel",
    "AutoModelForCausalLM",
    "AutoModelForImageTextToText",
    "AutoModelForSequenceClassification",
    "AutoModelForTokenClassification",
)
"""Those of transformers that make pruned models, where they make such of the stock architecture."""
AROUND = ("quantization_config", "transformers_version")
"""Fields that a reader of `config.json` may look for at its top."""
HOW_TO_LOAD = "of base_config: load this model with trust_remote_code=True, or after `import optimum_prune`"
"""Stands at the top of `config.json` as the hidden size. A stock class that is made to read it raises an error with these words in it,
where it would otherwise build a model of its default size with random weights."""
PATH = re.compile(r"[A-Za-z]\w*(\.[A-Za-z0-9]\w*)*")
"""Dotted names of modules: none that Python keeps for itself, and none that leads out."""
LONGEST_PATH = 200
OF_ATTENTION = ("num_attention_heads", "num_key_value_heads")
"""Fields that tell how much an attention keeps of each token."""


class LayerConfig:
    """A config as one decoder layer sees it: some fields its own, everything else the model's."""

    is_heterogeneous = False

    def __init__(self, config: PreTrainedConfig, own: dict[str, Any]) -> None:
        self.__dict__.update(own, _config=config)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "_config" not in self.__dict__:
            raise AttributeError(name)
        stored = (getattr(self._config, "attribute_map", None) or {}).get(name, name)
        return self.__dict__[stored] if stored in self.__dict__ else getattr(self._config, name)

    def validate_architecture(self) -> None:
        """The config of the model was looked at; a layer that was cut may be what nobody would make anew."""


def layer_configs(config: Any) -> list[LayerConfig]:
    """The configs of all layers of a pruned model, each in the place where the cache of its attention is."""
    own = config.pruned["own"]
    attends = ["attention" not in fields.get("without", ()) for fields in own]
    swapped = swapped_caches(attends, getattr(config, "layer_types", None))
    small = {name: 1 for name in OF_ATTENTION if hasattr(config, name)}  # where a cache is made nevertheless
    found = []
    for place in range(len(own)):
        layer = swapped.get(place, place)
        fields = {name: value for name, value in own[layer].items() if name != "without"}
        found.append(LayerConfig(config, fields if attends[layer] else small))
    return found


def swapped_caches(attends: Sequence[bool], layer_types: Sequence[str] | None) -> dict[int, int]:
    """The layers that use the cache of another one, and which.

    A model asks the cache of its first layer of each type how long it is. Where that layer has no attention, the next one of its
    type uses that cache.

    Args:
        attends: whether each layer has an attention.

    Raises:
        ValueError: none of a type has.
    """
    types, swapped = list(layer_types or [""] * len(attends)), dict[int, int]()
    for kind in dict.fromkeys(types):
        of_kind = [index for index, found in enumerate(types) if found == kind]
        left = [index for index in of_kind if attends[index]]
        if not left:
            raise ValueError(f"No attention of the type '{kind or 'attention'}' would be left, and caches need one.")
        swapped |= {of_kind[0]: left[0], left[0]: of_kind[0]}
    return swapped


class PrunedConfig(PreTrainedConfig):  # type: ignore[misc]  # not annotated
    """Reads the config of a pruned model: a config of its stock architecture that knows how its layers differ."""

    model_type = MODEL_TYPE

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """The config that a `config.json` describes; a ValueError if it is not as this file writes such."""
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

        from .modeling_pruned import register  # where transformers fetches this file, it fetches that one too

        base = config_dict.get("base_model_type")
        stock = CONFIG_MAPPING[base] if isinstance(base, str) and base in CONFIG_MAPPING else None
        expect(stock in MODEL_FOR_CAUSAL_LM_MAPPING, f"is of {base!r}, which is no language model of transformers")
        register(stock)
        return pruned_config(stock).from_dict(config_dict, **kwargs)  # type: ignore[arg-type]  # not None any more


class OfPruned:
    """Marks the classes that are made here: each is on top of a stock one."""


class ConfigOfPruned(OfPruned):
    """What the config of a pruned model adds to that of its stock architecture."""

    model_type = MODEL_TYPE
    pruned: dict[str, Any]
    allow_global_per_layer_attribute_access = True
    """Of a field of which layers have their own, the model's is the largest."""

    @property
    def base_model_type(self) -> str:
        """The model type of the stock architecture."""
        return str(stock_of(type(self)).model_type)

    @property
    def is_heterogeneous(self) -> bool:
        """Whether caches and engines are to ask each layer for its sizes."""
        return "pruned" in self.__dict__ and not self.pruned["config"]

    @property
    def per_layer_config(self) -> Any:
        """What they find then."""
        return layer_configs(self) if self.is_heterogeneous else super().per_layer_config  # type: ignore[misc]  # of the stock config

    def _update_heterogeneous_to_dict_output(self, d: dict[str, Any]) -> None:
        """`pruned` says it."""

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """A config from what a `config.json` holds; a ValueError if that is not as it is written here."""
        if "base_config" in config_dict:  # else it is what `to_dict` returned
            base = config_dict["base_config"]
            expect(isinstance(base, Mapping), "has no config of the stock architecture")
            expect(
                not set(base) & set(vars(ConfigOfPruned)),
                "has a config of the stock architecture with fields of this one",
            )
            check(config_dict.get("pruned"))
            around = {name: config_dict[name] for name in (*AROUND, "pruned", "auto_map") if name in config_dict}
            around |= {"architectures": config_dict.get("architectures"), "model_type": MODEL_TYPE}
            config_dict = {**base, **around}
        expect("pruned" in config_dict, "is missing")
        return super().from_dict(config_dict, **kwargs)  # type: ignore[misc]  # of the stock config

    def to_json_string(self, use_diff: bool = True) -> str:
        """As `config.json` has it."""
        base = json.loads(super().to_json_string(use_diff))  # type: ignore[misc]  # likewise
        plain = {name: base.pop(name) for name in (*AROUND, "pruned") if name in base}
        base.pop("auto_map", None)
        del base["model_type"]  # with it, a stock class would take this part for a config of its own
        models = {auto: kind.__name__ for auto, kind in stock_models(stock_of(type(self))).items()}
        named, *_ = base.get("architectures") or [models["AutoModelForCausalLM"]]
        base["architectures"] = [named.removeprefix("Pruned")]
        auto_map = {auto: f"{FILES[1]}.Pruned{name}" for auto, name in models.items()}
        if "dtype" in base:
            plain["dtype"] = base["dtype"]
        plain.update(base_model_type=self.base_model_type, base_config=base)
        plain |= dict.fromkeys(_stumbling(self), HOW_TO_LOAD)
        plain.update(architectures=[f"Pruned{base['architectures'][0]}"], model_type=MODEL_TYPE)
        plain["auto_map"] = {"AutoConfig": f"{FILES[0]}.PrunedConfig", **auto_map}
        return json.dumps(plain, indent=2, sort_keys=True) + "\n"

    def to_json_file(self, json_file_path: Any, use_diff: bool = True) -> None:
        """Brings these files along with the config: where transformers saves that, and pushes what has been saved."""
        super().to_json_file(json_file_path, use_diff)  # type: ignore[misc]  # likewise
        here, there = Path(__file__).resolve().parent, Path(json_file_path).resolve().parent
        if Path(json_file_path).name == "config.json" and here != there:
            for name in FILES:
                shutil.copyfile(here / f"{name}.py", there / f"{name}.py")


def _stumbling(config: Any) -> set[str]:
    """Fields at which a stock class stumbles: by its own name for the hidden size, and of one with several parts that of the text."""
    return {
        "hidden_size",
        (config.attribute_map or {}).get("hidden_size", "hidden_size"),
        *config.pruned["config"].split(".")[:1],
    } - {""}


def stock_models(stock: type) -> dict[str, type]:
    """The model classes of an architecture, by the class of transformers that makes them."""
    autos = {name: getattr(transformers, name)._model_mapping for name in AUTO_CLASSES if hasattr(transformers, name)}
    return {name: mapping[stock] for name, mapping in autos.items() if stock in mapping}


def expect(holds: bool, otherwise: str) -> None:
    """Refuses what a config says, with a ValueError, unless something holds."""
    if not holds:
        raise ValueError(f"its 'pruned' {otherwise}")


def check(pruned: Any) -> None:
    """Refuses what a config says of layers, with a ValueError, if it is anything but names of modules and fields, and sizes."""
    names = ("layers", "config", "blocks", "own")
    expect(isinstance(pruned, Mapping) and set(names) <= set(pruned), f"does not say {', '.join(names)}")
    layers, config, blocks, own = (pruned[name] for name in names)
    listed = isinstance(blocks, Mapping) and all(isinstance(paths, list) and paths for paths in blocks.values())
    expect(listed and {"attention", "feed_forward"} <= set(blocks), "has blocks that are no lists of modules")
    for path in (layers, *([config] if config else []), *(path for paths in blocks.values() for path in paths)):
        plain = isinstance(path, str) and len(path) <= LONGEST_PATH and PATH.fullmatch(path)
        expect(bool(plain), f"names {str(path)[:LONGEST_PATH]!r}, which is no path of a module")
    expect(isinstance(own, list) and all(isinstance(each, Mapping) for each in own), "has no fields for each layer")
    for name, value in ((name, value) for each in own for name, value in each.items()):
        if name == "without":
            right = isinstance(value, list) and all(isinstance(block, str) and block in blocks for block in value)
        else:
            right = PATH.fullmatch(name) is not None and "." not in name and type(value) is int and value > 0
        expect(right, f"has {name!r}: {str(value)[:LONGEST_PATH]} of a layer, which it cannot have")


def stock_of(kind: type) -> Any:
    """The class of the stock architecture that a class made here is on top of; any other as it is."""
    return kind.__bases__[1] if issubclass(kind, OfPruned) else kind


def pruned_config(base: type[PreTrainedConfig]) -> type[PreTrainedConfig]:
    """The class of configs for pruned models of an architecture, from its stock config's class or from theirs."""
    return _pruned_config(stock_of(base))


@functools.cache
def _pruned_config(stock: type) -> type[PreTrainedConfig]:
    return type(f"Pruned{stock.__name__}", (ConfigOfPruned, stock), {"__module__": __name__})


def stock_named(name: str, module: str) -> Any:
    """The stock class that a class made here is called after; an AttributeError, as of any module, if there is none."""
    stock = getattr(transformers, name.removeprefix("Pruned"), None) if name.startswith("Pruned") else None
    if not isinstance(stock, type):
        raise AttributeError(f"module {module!r} has no attribute {name!r}")  # noqa: TRY004
    return stock


def __getattr__(name: str) -> Any:
    """The classes made here, by their names: so objects of them can be pickled."""
    return pruned_config(stock_named(name, __name__))
