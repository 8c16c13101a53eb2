"""The matrices of a decoder layer that hidden states are multiplied by, and how to see what reaches each; and what experts put out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from torch import Tensor, nn

from optimum_prune.anatomy.routing import channels, experts_of, hidden_states, outputs

if TYPE_CHECKING:
    from optimum_prune.anatomy.axis import Observer
    from optimum_prune.anatomy.decoder import DecoderLayer


@dataclass(frozen=True)
class Matrix:
    """A parameter of a decoder layer that is one linear map, or, of experts, one for each."""

    parameter: str
    """Its path from the layer."""
    module: str
    """That of the module whose calls tell what reaches it."""
    read: Observer | None = None
    """How to read from a call what reaches each of the maps, if it is not the first argument."""


def matrices(layer: DecoderLayer) -> list[Matrix]:
    """All linear modules of a layer, and the experts that lie in one tensor; what chooses or weighs experts is none of them."""
    return list(_matrices(layer))


def _matrices(layer: DecoderLayer) -> Iterator[Matrix]:
    from transformers.pytorch_utils import Conv1D

    experts = experts_of(layer.family, layer.module)
    for path, module in layer.module.named_modules():
        if experts is not None and path == experts.router:
            continue
        if isinstance(module, (nn.Linear, Conv1D)) and len(layer.linear_of(f"{path}.weight").weight) > 1:
            yield Matrix(f"{path}.weight", path)
    if experts is not None:
        where = experts.module
        yield Matrix(f"{where}.{experts.inputs}", where, hidden_states)
        yield Matrix(f"{where}.{experts.output}", where, partial(channels, experts.inputs))


@dataclass(frozen=True)
class Mixture:
    """The mixture of experts that is the FFN of a decoder layer."""

    module: str
    """The path of the module that holds them, from the layer."""
    outputs: Callable[..., Iterator[tuple[int, Tensor, Tensor]]]
    """From a call of it: of each expert, what it makes of the tokens that are routed to it, and how the router weights that."""


def mixture_of(layer: DecoderLayer) -> Mixture | None:
    """That of a decoder layer, if it has one."""
    experts = experts_of(layer.family, layer.module)
    return None if experts is None else Mixture(experts.module, partial(outputs, experts.inputs, experts.output))
