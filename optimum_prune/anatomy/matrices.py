"""The matrices of a decoder layer that hidden states are multiplied by, and how to see what reaches each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from torch import nn

from optimum_prune.anatomy.routing import channels, experts_of, hidden_states

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
