"""Where things live in an architecture. A family is data; what is done with it is done elsewhere."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from typing import TYPE_CHECKING, NamedTuple, cast

import torch
from torch import Tensor, nn

from optimum_prune.cuts import BLOCKS
from optimum_prune.errors import FamilyError
from optimum_prune.shape import LayerShape, Shape

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


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


class HeadCounts(NamedTuple):
    """How many heads a decoder layer has."""

    key_value: int
    queries: int
    """Query heads that share a key-value head."""
    size: int
    """Features of a head."""


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
    shared: FeedForward | None = None
    """Experts through which every token goes, as one FFN."""


@dataclass(frozen=True)
class Linear:
    """A linear module as `y = W x + b`, whether it stores W, as `nn.Linear` does, or W', as GPT-2's `Conv1D` does."""

    module: nn.Module
    transposed: bool

    @property
    def weight(self) -> Tensor:
        """W, with shape (out, in): a view of the module's parameter."""
        stored = cast(Tensor, self.module.weight).detach()
        return stored.T if self.transposed else stored

    @property
    def bias(self) -> Tensor | None:
        """b, with shape (out,)."""
        stored = cast("Tensor | None", self.module.bias)
        return None if stored is None else stored.detach()

    def stored(self, weight: Tensor) -> Tensor:
        """A weight of shape (out, in) as the module stores it."""
        return weight.T.contiguous() if self.transposed else weight.contiguous()

    def replace(self, weight: Tensor, bias: Tensor | None) -> None:
        """Gives the module another weight of shape (out, in), and a bias; the features follow."""
        self._set("weight", self.stored(weight))
        if bias is not None:
            self._set("bias", bias)
        if isinstance(self.module, nn.Linear):
            self.module.out_features, self.module.in_features = weight.shape
        else:
            self.module.nf, self.module.nx = weight.shape  # type: ignore[assignment]  # plain numbers, not submodules

    def _set(self, name: str, value: Tensor) -> None:
        old = cast(nn.Parameter, getattr(self.module, name))
        setattr(self.module, name, nn.Parameter(value, requires_grad=old.requires_grad))


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

    def text_config(self, config: PreTrainedConfig) -> PreTrainedConfig:
        """The part of the config that describes the decoder layers."""
        return reduce(getattr, self.config.split("."), config) if self.config else config

    def shape(self, model: PreTrainedModel) -> Shape:
        """The shape of a model, with or without storage for its weights.

        Raises:
            FamilyError: the model does not look as this family says.
        """
        text = self.text_config(model.config)
        layers = tuple(self.layer_shape(layer, text) for layer in self.layers_of(model))
        total = sum(parameter.numel() for parameter in model.parameters())
        return Shape(layers, total - sum(layer.parameters for layer in layers))

    def block_modules(self, block: str) -> tuple[str, ...]:
        """Paths of the modules that make up a block of a layer, from where its hidden states enter to where they leave."""
        if block == "attention":
            return (self.attention,)
        feed_forward = self.feed_forward
        return (feed_forward.module,) if feed_forward.module else (*feed_forward.inputs, feed_forward.output)

    def blocks_of(self, layer: nn.Module) -> tuple[str, ...]:
        """The blocks that a decoder layer has."""
        last = {block: self.module(layer, self.block_modules(block)[-1]) for block in BLOCKS}
        return tuple(block for block, module in last.items() if not getattr(module, "puts_out_nothing", False))

    def layer_shape(self, layer: nn.Module, config: PreTrainedConfig) -> LayerShape:
        """The shape of a decoder layer as it is, given the config of the decoder.

        Raises:
            FamilyError: the layer does not look as this family says.
        """
        shape = LayerShape(sum(parameter.numel() for parameter in layer.parameters()))
        blocks = self.blocks_of(layer)
        if self.heads is not None and "attention" in blocks:
            heads, queries, _ = self.head_counts(layer)
            allowed = (
                count
                for count in range(1, heads + 1)
                if not self.heads.divide_hidden or config.hidden_size % (count * queries) == 0
            )
            shape = replace(shape, heads=heads, per_head=self._head_parameters(layer), possible_heads=tuple(allowed))
        experts = self.experts_of(layer)
        if "feed_forward" not in blocks:
            return shape
        if experts is None:
            width, per_channel = self.width_of(layer), self._channel_parameters(layer, self.feed_forward)
            return replace(shape, width=width, per_channel=per_channel)
        assert self.experts is not None
        inputs, output = (cast(Tensor, getattr(experts, name)) for name in (self.experts.inputs, self.experts.output))
        width = output.shape[2]
        per_channel = (inputs.numel() + output.numel()) // width
        if self.experts.shared is not None:
            shared = self.experts.shared
            times = self.linear(layer, shared.output).weight.shape[1] // width
            per_channel += times * self._channel_parameters(layer, shared)
        return replace(shape, expert_width=width, per_expert_channel=per_channel)

    def fields(self, layer: nn.Module) -> dict[str, int]:
        """What the config has to say of the sizes of a decoder layer."""
        fields = {}
        blocks = self.blocks_of(layer)
        if self.heads is not None and "attention" in blocks:
            heads, queries, _ = self.head_counts(layer)
            fields = {self.heads.key_value_heads: heads, self.heads.query_heads: heads * queries}
        experts = self.experts_of(layer)
        if "feed_forward" not in blocks:
            return fields
        if experts is None:
            return {**fields, self.feed_forward.width: self.width_of(layer)}
        assert self.experts is not None
        return {**fields, self.experts.width: cast(Tensor, getattr(experts, self.experts.output)).shape[2]}

    def head_counts(self, layer: nn.Module) -> HeadCounts:
        """How many heads a decoder layer has, and how large they are."""
        assert self.heads is not None
        size = cast(int, self.module(layer, self.attention).head_dim)
        queries = self.linear(layer, self.attention_output).weight.shape[1] // size
        rows = sum(self.linear(layer, path).weight.shape[0] for path in self.heads.inputs)
        heads = (rows // size - queries) // 2
        return HeadCounts(heads, queries // heads, size)

    def _head_parameters(self, layer: nn.Module) -> int:
        """Parameters of a key-value head with its query heads."""
        assert self.heads is not None
        heads = self.head_counts(layer).key_value
        linears = [self.linear(layer, path) for path in self.heads.inputs]
        count = self.linear(layer, self.attention_output).weight.numel()
        count += sum(linear.weight.numel() + (0 if linear.bias is None else len(linear.bias)) for linear in linears)
        norms = (self.head_norm(layer, path) for path in self.heads.norms)
        return (count + sum(weight.numel() for weight in norms if weight is not None)) // heads

    def head_norm(self, layer: nn.Module, path: str) -> Tensor | None:
        """The weights of a norm that has some for each head, with shape (heads, head_dim)."""
        try:
            weight = layer.get_submodule(path).weight
        except AttributeError:
            return None
        return weight if isinstance(weight, Tensor) and weight.ndim == 2 else None

    def _channel_parameters(self, layer: nn.Module, feed_forward: FeedForward) -> int:
        """Parameters of a channel of an FFN."""
        size = self.linear(layer, feed_forward.output).weight.shape[0]
        for path in feed_forward.inputs:
            linear = self.linear(layer, path)
            size += feed_forward.parts * (linear.weight.shape[1] + (linear.bias is not None))
        return size

    def experts_of(self, layer: nn.Module) -> nn.Module | None:
        """The experts of a decoder layer, if its FFN is a mixture of them."""
        if self.experts is None:
            return None
        try:
            return layer.get_submodule(self.experts.module)
        except AttributeError:
            return None

    def layers_of(self, model: PreTrainedModel) -> nn.ModuleList:
        """The decoder layers of a model.

        Raises:
            FamilyError: there is no such list in this model.
        """
        return cast(nn.ModuleList, self._find(model, self.layers, (nn.ModuleList,)))

    def put_layers(self, model: PreTrainedModel, layers: nn.ModuleList) -> None:
        """Puts another list of decoder layers in the place of a model's; its config is not touched."""
        parent, _, name = self.layers.rpartition(".")
        setattr(model.get_submodule(parent), name, layers)

    def module(self, layer: nn.Module, path: str) -> nn.Module:
        """The module at a path of a decoder layer.

        Raises:
            FamilyError: it is not there.
        """
        return self._find(layer, path, (nn.Module,))

    def linear(self, layer: nn.Module, path: str) -> Linear:
        """The linear module at a path of a decoder layer.

        Raises:
            FamilyError: it is not there, or is not linear.
        """
        from transformers.pytorch_utils import Conv1D

        module = self._find(layer, path, (nn.Linear, Conv1D))
        return Linear(module, transposed=isinstance(module, Conv1D))

    def width_of(self, layer: nn.Module) -> int:
        """How many FFN channels a decoder layer has now."""
        return self.linear(layer, self.feed_forward.output).weight.shape[1]

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


def features_of(groups: Sequence[int], size: int) -> Tensor:
    """Indices of the features of some groups, such as heads, that lie side by side, `size` of each."""
    return (torch.tensor(groups)[:, None] * size + torch.arange(size)).flatten()


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
        f"To add it, install a plugin with this module:\n{_plugin_for(model_type)}"
    )


def _plugin_for(model_type: str) -> str:
    """The few lines of a plugin that describes an architecture."""
    module = model_type.replace("-", "_").replace(".", "_") + "_family"
    return f'''
    # {module}.py
    from optimum_prune import Family, FeedForward, hookimpl

    @hookimpl
    def families():
        yield Family(
            name="{model_type}",
            model_types=("{model_type}",),
            layers="model.layers",
            attention="self_attn",
            feed_forward=FeedForward(module="mlp", inputs=("mlp.gate_proj", "mlp.up_proj"), output="mlp.down_proj"),
        )

    # pyproject.toml
    [project.entry-points.optimum_prune]
    {module} = "{module}"
'''


def parameters(model: nn.Module) -> dict[str, int]:
    """Parameters of a model: of all of it, and without the embeddings and the output head. Tied ones count once."""
    total = sum(parameter.numel() for parameter in model.parameters())
    tables = [getattr(model, name)() for name in ("get_input_embeddings", "get_output_embeddings")]
    embedding = {id(table.weight): table.weight.numel() for table in tables if table is not None}
    return {"total": total, "non_embedding": total - sum(embedding.values())}
