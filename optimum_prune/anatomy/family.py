"""Where things live in an architecture. A family is data; what is done with it is done elsewhere."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import reduce
from typing import TYPE_CHECKING

from torch import nn

from optimum_prune.anatomy.linear import Linear
from optimum_prune.errors import FamilyError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from optimum_prune.anatomy.axis import AxisKind


@dataclass(frozen=True)
class Heads:
    """The heads of an attention. Paths start at the layer.

    What goes or stays is a key-value head with the query heads that share it; with as many of both, that is a head.
    """

    inputs: Mapping[str, tuple[str, ...]] = field(
        default_factory=lambda: {
            "self_attn.q_proj": ("query",),
            "self_attn.k_proj": ("key",),
            "self_attn.v_proj": ("value",),
        }
    )
    """Linear modules that put out queries, keys and values: what each puts out, one after the other."""
    query_heads: str = "num_attention_heads"
    """The config field that counts the query heads."""
    key_value_heads: str = "num_key_value_heads"
    """The config field that counts the key-value heads."""
    norms: Mapping[str, str] = field(default_factory=lambda: {"self_attn.q_norm": "query", "self_attn.k_norm": "key"})
    """Norms behind these inputs; where their weights have an axis of heads, it is cut too."""
    divide_hidden: bool = False
    """Whether the config insists that the number of query heads divides the hidden size."""


@dataclass(frozen=True)
class FeedForward:
    """An FFN of a decoder layer. Paths start at the layer."""

    module: str | None = "mlp"
    """The module that is the whole FFN, if there is one."""
    inputs: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    """Linear modules whose output features are the channels."""
    output: str = "mlp.down_proj"
    """The linear module whose input features are the channels."""
    width: str = "intermediate_size"
    """The config field that counts the channels."""
    parts: int = 1
    """How many stretches of channels each input puts out, one after the other: 2 where gate and up are fused."""


@dataclass(frozen=True)
class Experts:
    """The experts of a mixture, all in one module, whose weights have an axis of experts in front."""

    module: str = "mlp.experts"
    """Path of the module from the layer."""
    inputs: str = "gate_up_proj"
    """Its parameter with shape (experts, 2 channels, hidden): gates, then the channels they gate."""
    output: str = "down_proj"
    """Its parameter with shape (experts, hidden, channels)."""
    width: str = "moe_intermediate_size"
    """The config field that counts the channels of each."""
    count: str = "num_local_experts"
    """The config field that counts the experts."""
    router: str = "mlp.gate"
    """Path of the module that chooses among them, whose parameters and buffers have a row for each expert."""
    chosen: str = "num_experts_per_tok"
    """The config field that says through how many of them a token goes."""
    router_groups: str = "n_group"
    """The config field that says into how many groups of one size the router divides them, where a config has it."""
    chosen_groups: str = "topk_group"
    """The config field that says among how many of these groups it chooses."""
    shared: FeedForward | None = None
    """Experts through which every token goes, as one FFN."""


@dataclass(frozen=True)
class Family:
    """An architecture: dotted paths into the model, and the config fields that describe them.

    The defaults are Llama's. To support another architecture, yield one of these from a plugin's `families` hook.
    """

    name: str
    model_types: tuple[str, ...]
    """Values of `config.model_type` that this family describes."""
    config: str = ""
    """Path from the model's config to the config of its text decoder."""
    layers: str = "model.layers"
    """Path of the list of decoder layers."""
    depth: str = "num_hidden_layers"
    """The config field that counts the decoder layers."""
    per_layer: tuple[str, ...] = ("layer_types",)
    """Config fields that are lists with one entry for each decoder layer, where the config has them."""
    thresholds: tuple[str, ...] = ()
    """Config fields t that set the layers with index < t apart from the others."""
    strides: Mapping[str, str] = field(default_factory=dict)
    """Config fields n that set the layers n-1, 2n-1, ... apart -> the field that lists layers which are not, nonetheless."""
    attention: str = "self_attn"
    """Path from a decoder layer to its attention."""
    attention_output: str = "self_attn.o_proj"
    """Path from a decoder layer to the linear module whose input features are the heads' outputs."""
    heads: Heads | None = Heads()
    """None where a config cannot say that there are fewer heads of the same size."""
    feed_forward: FeedForward = FeedForward()
    experts: Experts | None = None
    """Of those layers whose FFN is a mixture of experts."""
    axes: tuple[AxisKind, ...] = ()
    """Further kinds of axes that its layers have."""

    def text_config(self, config: PreTrainedConfig) -> PreTrainedConfig:
        """The part of the config that describes the decoder layers."""
        return reduce(getattr, self.config.split("."), config) if self.config else config

    def module(self, root: nn.Module, path: str, kind: type[nn.Module] = nn.Module) -> nn.Module:
        """The module at a path from a decoder layer, or from the model.

        Raises:
            FamilyError: it is not there, or of another kind.
        """
        return self._find(root, path, (kind,))

    def linear(self, layer: nn.Module, path: str) -> Linear:
        """The linear module at a path of a decoder layer.

        Raises:
            FamilyError: it is not there, or is not linear.
        """
        from transformers.pytorch_utils import Conv1D

        module = self._find(layer, path, (nn.Linear, Conv1D))
        return Linear(module, transposed=isinstance(module, Conv1D))

    def _find(self, root: nn.Module, path: str, kinds: tuple[type[nn.Module], ...]) -> nn.Module:
        try:
            found = root.get_submodule(path)
        except AttributeError:
            found = None
        if not isinstance(found, kinds):
            raise FamilyError(
                f"Family '{self.name}' expects a {kinds[0].__name__} at '{path}' of {type(root).__name__} and finds "
                f"{type(found).__name__}. Add a family with the right paths in a plugin, under its own model_type."
            )
        return found


def find_family(config: PreTrainedConfig, families: Iterable[Family]) -> Family:
    """The family of a config's `model_type`.

    Raises:
        FamilyError: no family knows it; the message holds the plugin that would add it.
    """
    known = {model_type: family for family in families for model_type in family.model_types}
    model_type = getattr(config, "base_model_type", config.model_type)  # of a model whose layers differ
    if model_type in known:
        return known[model_type]
    raise FamilyError(
        f"No family describes the architecture '{model_type}'. Known: {', '.join(sorted(known))}. "
        f"To add it, install a plugin with this module:\n{_plugin_for(model_type, config)}"
    )


def per_layer_lists(config: PreTrainedConfig) -> tuple[str, ...]:
    """The fields of a decoder's config that are lists with one entry for each of its layers, found by their length."""
    depth = getattr(config, "num_hidden_layers", 0)
    lists = {name: list(value) for name, value in vars(config).items() if isinstance(value, (list, tuple))}
    return tuple(name for name, value in sorted(lists.items()) if len(value) == depth and value != list(range(depth)))


def _plugin_for(model_type: str, config: PreTrainedConfig) -> str:
    """The few lines of a plugin that describes an architecture, with what its config tells of it."""
    module = re.sub(r"\W", "_", model_type) + "_family"
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    inside = next((name for name, value in vars(config).items() if value is text and text is not config), "")
    told = {
        "layers": "model.language_model.layers" if inside else "model.layers",
        "config": inside,
        "depth": (getattr(text, "attribute_map", None) or {}).get("num_hidden_layers", ""),
        "per_layer": per_layer_lists(text) or "",
    }
    lines = "".join(f"            {name}={_quoted(value)},\n" for name, value in told.items() if value)
    return f'''
    # {module}.py
    from optimum_prune import Family, FeedForward, hookimpl

    @hookimpl
    def families():
        yield Family(
            name={_quoted(model_type)},
            model_types=({_quoted(model_type)},),
{lines}            attention="self_attn",
            feed_forward=FeedForward(module="mlp", inputs=("mlp.gate_proj", "mlp.up_proj"), output="mlp.down_proj"),
        )

    # pyproject.toml
    [project.entry-points.optimum_prune]
    {module} = "{module}"
'''


def _quoted(value: str | tuple[str, ...]) -> str:
    """A value as Python code."""
    if isinstance(value, str):
        return json.dumps(value)
    return f"({', '.join(map(json.dumps, value))}{',' if len(value) == 1 else ''})"
