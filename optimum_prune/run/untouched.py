"""Whether a pass that is to decide has changed the model itself."""

from __future__ import annotations

import weakref
from collections.abc import Collection
from typing import TYPE_CHECKING, NamedTuple

import torch

from optimum_prune.errors import PassError

if TYPE_CHECKING:
    from torch import Tensor, nn

SAMPLES = 32
"""Elements of a parameter that are compared."""


class _Seen(NamedTuple):
    """A parameter as it was."""

    name: str
    parameter: weakref.ref[Tensor]
    address: int
    version: int
    sample: Tensor


class Untouched:
    """The parameters of a model before a pass, to tell afterwards whether others than those that it decided on were changed.

    What is noticed: operations in place, values put in the place of others, and changes by a way around both that reach one of the
    elements that are compared. Parameters that surgery has replaced are gone, and nobody's concern.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._seen = [
            _Seen(name, weakref.ref(value), value.data_ptr(), value._version, _sample(value))
            for name, value in model.named_parameters()
        ]

    def check(self, step: str, decided: Collection[str]) -> None:
        """Refuses a model whose weights a pass has changed.

        Args:
            step: the pass.
            decided: names that these parameters had before the pass, of those that it yielded new values for.

        Raises:
            PassError: naming the first.
        """
        there = {id(value) for value in self._model.parameters()}
        for seen in self._seen:
            parameter = seen.parameter()
            if parameter is None or id(parameter) not in there or seen.name in decided:
                continue
            same = (parameter.data_ptr(), parameter._version) == (seen.address, seen.version)
            if not same or not torch.equal(_sample(parameter), seen.sample):
                raise PassError(
                    f"The pass '{step}' changed the weight '{seen.name}' of the model itself. A pass that prunes yields its new values in a "
                    f"Decision, and optimum-prune puts them in; so mend the pass, or make it a RecoverPass."
                )


def _sample(value: Tensor) -> Tensor:
    """Some elements of a tensor, bit for bit."""
    flat = value.detach().reshape(-1) if value.is_contiguous() else value.detach().flatten()
    step = max(flat.numel() // SAMPLES, 1)
    return flat[::step][:SAMPLES].clone().view(torch.uint8)
