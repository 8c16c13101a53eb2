"""What a mixture sends to which of its experts, and what they make of it, read from the calls of the module that holds them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from jaxtyping import Bool, Float

    from optimum_prune.anatomy.family import Experts, Family


def experts_of(family: Family, layer: nn.Module) -> Experts | None:
    """What the family says of experts, if the FFN of this layer is a mixture of them."""
    if family.experts is None:
        return None
    try:
        layer.get_submodule(family.experts.module)
    except AttributeError:
        return None
    return family.experts


def routed(
    experts: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], mask: Bool[Tensor, "windows length"]
) -> Iterator[tuple[int, Float[Tensor, "tokens hidden"], Float[Tensor, " tokens"]]]:
    """Of each expert, the hidden states of the tokens that are routed to it, padding left out, and how the router weights them."""
    hidden, chosen, weights = (*args, *kwargs.values())
    counted = mask.flatten().to(hidden.device)
    for expert in range(len(next(experts.parameters()))):
        token, place = torch.where((chosen == expert) & counted[:, None])
        yield expert, hidden[token], weights[token, place].float()


def hidden_states(experts: nn.Module, *call: Any) -> Iterator[tuple[int, Float[Tensor, "tokens hidden"]]]:
    """What reaches the first matrix of each expert."""
    return ((expert, hidden) for expert, hidden, _ in routed(experts, *call))


def channels(inputs: str, experts: nn.Module, *call: Any) -> Iterator[tuple[int, Float[Tensor, "tokens channels"]]]:
    """What reaches the last matrix of each expert.

    Args:
        inputs: the name of the first.
    """
    return ((expert, made) for expert, made, _ in _channels(inputs, experts, *call))


def weighted_channels(
    inputs: str, experts: nn.Module, *call: Any
) -> Iterator[tuple[int, Float[Tensor, "tokens channels"]]]:
    """The same, each token weighted as the router weights it."""
    for expert, made, weights in _channels(inputs, experts, *call):
        yield expert, made.float() * weights[:, None]


def outputs(
    inputs: str, output: str, experts: nn.Module, *call: Any
) -> Iterator[tuple[int, Float[Tensor, "tokens hidden"], Float[Tensor, " tokens"]]]:
    """What each expert makes of the tokens that are routed to it, and how the router weights that.

    Args:
        inputs: the name of the first matrix.
        output: of the last.
    """
    for expert, made, weights in _channels(inputs, experts, *call):
        matrix, bias = getattr(experts, output)[expert], getattr(experts, f"{output}_bias", None)
        yield expert, nn.functional.linear(made, matrix, None if bias is None else bias[expert]), weights


def _channels(inputs: str, experts: nn.Module, *call: Any) -> Iterator[tuple[int, Tensor, Tensor]]:
    apply_gate = cast("Callable[[Tensor], Tensor]", experts._apply_gate)
    for expert, hidden, weights in routed(experts, *call):
        yield expert, apply_gate(nn.functional.linear(hidden, getattr(experts, inputs)[expert])), weights
