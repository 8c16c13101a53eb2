"""The axes of decoder layers: heads, FFN channels, the channels of experts, and whole experts.

This is the only module that knows what they are. From the data of a family it finds, in a layer, the parameters that each unit
lies in; whatever cuts, counts, observes or refits them asks the axis.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Mapping
from functools import partial
from math import ceil
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from optimum_prune.anatomy.axis import Axis, AxisKind, Member
from optimum_prune.anatomy.routing import experts_of, weighted_channels
from optimum_prune.anatomy.shape import ATTENTION, FEED_FORWARD
from optimum_prune.errors import FamilyError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from optimum_prune.anatomy.family import Experts, Family, FeedForward

ROWS_OF_16_BYTES = 8
"""Experts are multiplied in groups by kernels that take rows of whole 16 bytes only."""


# Heads: key-value heads, each with the query heads that share it


class _HeadCounts(NamedTuple):
    key_value: int
    queries: int
    """Query heads that share a key-value head."""
    size: int
    """Features of a head."""


def _count_heads(family: Family, layer: nn.Module, config: PreTrainedConfig) -> _HeadCounts:
    assert family.heads is not None
    size = cast(int, family.module(layer, family.attention).head_dim)
    queries = family.linear(layer, family.attention_output).weight.shape[1] // size
    rows = sum(family.linear(layer, path).weight.shape[0] for path in family.heads.inputs)
    heads = (rows // size - queries) // 2
    if heads < 1 or queries % heads:
        name = config.name_or_path or type(config).__name__
        raise FamilyError(f"{name} has {queries} heads for {heads} key-value heads. Mend its config.json.")
    return _HeadCounts(heads, queries // heads, size)


def _find_heads(family: Family, layer: nn.Module, config: PreTrainedConfig) -> Axis | None:
    if family.heads is None:
        return None
    heads, queries, size = _count_heads(family, layer, config)
    features = {"query": queries * size, "key": size, "value": size}
    members = [
        member
        for path, roles in family.heads.inputs.items()
        for member in _outputs(family, layer, path, tuple(features[role] for role in roles))
    ]
    for path, role in family.heads.norms.items():
        if _has_rows_for_heads(layer, path):
            members.append(Member(f"{path}.weight", 0, (queries if role == "query" else 1,)))
    members.append(_inputs(family, layer, family.attention_output, queries * size))
    counts = (n for n in range(1, heads + 1) if config.hidden_size % (n * queries) == 0)
    possible = tuple(counts) if family.heads.divide_hidden else None
    return Axis(
        name="heads",
        units=heads,
        members=tuple(members),
        output=f"{family.attention_output}.weight",
        fields={family.heads.key_value_heads: 1, family.heads.query_heads: queries},
        pinned={"head_dim": size},
        possible=possible,
        units_are="key-value heads",
        place="attention",
    )


def _has_rows_for_heads(layer: nn.Module, path: str) -> bool:
    """Whether a norm has weights of shape (heads, head_dim), and not the same for all heads."""
    try:
        weight = layer.get_submodule(path).weight
    except AttributeError:
        return False
    return isinstance(weight, Tensor) and weight.ndim == 2


def size_of_unit(module: nn.Module, width: int) -> int:
    """Features of a head of an attention whose heads are no axis; of any other module, all."""
    size = getattr(module, "head_dim", width)
    return size if isinstance(size, int) else width


# Channels of an FFN


def _find_channels(family: Family, layer: nn.Module, config: PreTrainedConfig) -> Axis | None:
    if experts_of(family, layer) is not None:
        return None
    where = {"fields": {family.feed_forward.width: 1}, "units_are": "channels of the FFN", "place": "FFN"}
    return _channels(family, layer, family.feed_forward, name="channels", **where)


def _channels(family: Family, layer: nn.Module, feed_forward: FeedForward, **about: Any) -> Axis:
    stretches = (1,) * feed_forward.parts
    members = [member for path in feed_forward.inputs for member in _outputs(family, layer, path, stretches)]
    members.append(_inputs(family, layer, feed_forward.output, 1))
    return Axis(
        units=family.linear(layer, feed_forward.output).weight.shape[1],
        members=tuple(members),
        output=f"{feed_forward.output}.weight",
        **about,
    )


# Experts of a mixture


def _find_expert_channels(family: Family, layer: nn.Module, config: PreTrainedConfig) -> Axis | None:
    if (experts := experts_of(family, layer)) is None:
        return None
    inputs, output = f"{experts.module}.{experts.inputs}", f"{experts.module}.{experts.output}"
    count, _, width = layer.get_parameter(output).shape
    return Axis(
        name="experts",
        units=width,
        members=(Member(inputs, 1, (1, 1)), Member(output, 2)),
        output=output,
        fields={experts.width: 1},
        groups=count,
        grouped_by="whole_experts",
        chosen=getattr(config, experts.chosen, None) or 1,
        multiple=ROWS_OF_16_BYTES,
        observed=(experts.module, partial(weighted_channels, experts.inputs)),
        units_are="channels of an expert",
        place="expert",
    )


def _find_shared_channels(family: Family, layer: nn.Module, config: PreTrainedConfig) -> Axis | None:
    if (experts := experts_of(family, layer)) is None or experts.shared is None:
        return None
    width = layer.get_parameter(f"{experts.module}.{experts.output}").shape[2]
    times = family.linear(layer, experts.shared.output).weight.shape[1] // width
    where = {"units_are": "channels of the shared experts", "place": "shared experts"}
    return _channels(family, layer, experts.shared, name="shared", follows="experts", times=times, **where)


def _find_whole_experts(family: Family, layer: nn.Module, config: PreTrainedConfig) -> Axis | None:
    if (experts := experts_of(family, layer)) is None:
        return None
    parts = {path: family.module(layer, path) for path in (experts.module, experts.router)}
    members = tuple(
        Member(f"{path}.{name}", 0)
        for path, part in parts.items()
        for name, _ in (*part.named_parameters(recurse=False), *part.named_buffers(recurse=False))
    )
    count = layer.get_parameter(f"{experts.module}.{experts.output}").shape[0]
    return Axis(
        name="whole_experts",
        units=count,
        members=members,
        fields={experts.count: 1},
        possible=_possible_experts(experts, config, count),
        parts=getattr(config, experts.router_groups, None) or 1,
        units_are="experts",
        place="mixture",
    )


def _possible_experts(experts: Experts, config: PreTrainedConfig, count: int) -> tuple[int, ...]:
    """How many experts may be left: as many in each of the router's groups, and enough to choose from."""
    names = (experts.chosen, experts.router_groups, experts.chosen_groups)
    chosen, groups, among = (getattr(config, name, None) or 1 for name in names)
    fewest = chosen if groups == 1 else max(ceil(chosen / among), 2)  # a group is scored by its two best
    return tuple(range(fewest * groups, count + 1, groups))


# Where units lie in a linear module


def _outputs(family: Family, layer: nn.Module, path: str, stretches: tuple[int, ...]) -> Iterator[Member]:
    """Rows of W, and of its bias."""
    linear = family.linear(layer, path)
    yield Member(f"{path}.weight", 1 if linear.transposed else 0, stretches)
    if linear.bias is not None:
        yield Member(f"{path}.bias", 0, stretches)


def _inputs(family: Family, layer: nn.Module, path: str, features: int) -> Member:
    """Columns of W."""
    return Member(f"{path}.weight", 0 if family.linear(layer, path).transposed else 1, (features,))


KINDS = (
    AxisKind("heads", _find_heads, ATTENTION, inputs_are="width of attention"),
    AxisKind("channels", _find_channels, FEED_FORWARD, size="width", column="FFN width", inputs_are="FFN width"),
    AxisKind(
        "experts",
        _find_expert_channels,
        FEED_FORWARD,
        size="expert_width",
        column="FFN width",
        label="experts",
        inputs_are="expert width",
    ),
    AxisKind("shared", _find_shared_channels, FEED_FORWARD),
    AxisKind("whole_experts", _find_whole_experts, FEED_FORWARD, size="experts"),
)
"""Those of every family, in the order in which they are cut."""


# Features of hidden states


def find_hidden(
    family: Family, model: PreTrainedModel, sizes: Mapping[str, int], outputs: Collection[str]
) -> Axis | None:
    """The features of hidden states: whatever of a model is as large as they are, found by making a model with twice as many.

    Args:
        sizes: what the config has to say of all other sizes, so that they stay.
        outputs: paths of the parameters behind the blocks, whose inputs must stay.

    Returns:
        None where the config cannot say another size of hidden states without changing another one.
    """
    size: int = family.text_config(model.config).hidden_size
    larger = _shapes_with(family, model, {**sizes, "hidden_size": 2 * size})
    if larger is None:
        return None
    members = []
    for name, parameter in model.named_parameters():
        grown = larger.get(name, ())
        if len(grown) != parameter.ndim:
            return None
        along = [dim for dim in range(parameter.ndim) if grown[dim] != parameter.shape[dim]]
        if any((parameter.shape[dim], grown[dim]) != (size, 2 * size) for dim in along):
            return None
        if name in outputs and len(along) == parameter.ndim > 1:
            return None
        members += [Member(name, dim) for dim in along]
    possible = None
    if family.heads is not None and family.heads.divide_hidden:
        heads = getattr(family.text_config(model.config), family.heads.query_heads)
        possible = tuple(range(heads, size + 1, heads))
    return Axis(
        name="hidden",
        units=size,
        members=tuple(members),
        fields={"hidden_size": 1},
        pinned=dict(sizes),
        possible=possible,
        multiple=1 if family.experts is None else ROWS_OF_16_BYTES,
        units_are="features of hidden states",
        place="model",
    )


def _shapes_with(family: Family, model: PreTrainedModel, sizes: Mapping[str, int]) -> dict[str, torch.Size] | None:
    """The shapes of the parameters of such a model with other sizes in its config; None where that cannot be."""
    config = copy.deepcopy(model.config)
    for name, value in sizes.items():
        setattr(family.text_config(config), name, value)
    try:
        with torch.device("meta"):
            made = type(model)(config)
    except Exception:  # whatever an architecture makes of sizes that it does not expect
        return None
    return {name: parameter.shape for name, parameter in made.named_parameters()}


HIDDEN = AxisKind("hidden", lambda *_: None, size="hidden_size", column="hidden size")
"""That of the whole model, which no layer has by itself."""
