"""Where things live in an architecture. A family is data; what is done with it is done elsewhere."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import reduce
from typing import TYPE_CHECKING, cast

from torch import Tensor, nn

from optimum_prune.errors import FamilyError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


@dataclass(frozen=True)
class Shape:
    """The sizes that pruning changes."""

    layers: int
    """Decoder layers."""
    width: int
    """FFN channels of a layer."""


@dataclass(frozen=True)
class FeedForward:
    """The FFN of a decoder layer. Paths start at the layer."""

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
    hidden_multiple: int | None = None
    """Where the config's width may be None: how many times the hidden size it then is."""


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
    attention: str = "self_attn"
    """Path from a decoder layer to its attention."""
    feed_forward: FeedForward = FeedForward()

    def text_config(self, config: PreTrainedConfig) -> PreTrainedConfig:
        """The part of the config that describes the decoder layers."""
        return reduce(getattr, self.config.split("."), config) if self.config else config

    def shape(self, config: PreTrainedConfig) -> Shape:
        """The shape that a config describes."""
        text = self.text_config(config)
        width = getattr(text, self.feed_forward.width)
        if width is None and self.feed_forward.hidden_multiple is not None:
            width = self.feed_forward.hidden_multiple * text.hidden_size
        return Shape(getattr(text, self.depth), width)

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


def find_family(config: PreTrainedConfig, families: Iterable[Family]) -> Family:
    """The family of a config's `model_type`.

    Raises:
        FamilyError: no family knows it; the message holds the plugin that would add it.
    """
    known = {model_type: family for family in families for model_type in family.model_types}
    model_type = config.model_type
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
