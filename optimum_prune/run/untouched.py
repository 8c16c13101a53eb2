"""Whether a pass that is to decide, or a hook that is to look, has changed the model itself."""

from __future__ import annotations

import weakref
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

import torch

from optimum_prune.errors import PassError, PluginError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from optimum_prune.machine.mapped_weights import MappedWeights
    from optimum_prune.run.models import Models

SAMPLES, ON_DISK = 32, 4
"""Elements of a parameter that are compared, and of one that lies on disk, of which each may have to be read there."""


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

    Args:
        weights: where the model's weights are, if on disk.
    """

    def __init__(self, model: nn.Module, weights: MappedWeights | None = None) -> None:
        self._model = model
        self._weights = weights
        self._seen = [
            _Seen(name, weakref.ref(value), value.data_ptr(), value._version, self._sample(value))
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
            if self._changed(parameter, seen):
                raise PassError(
                    f"The pass '{step}' changed the weight '{seen.name}' of the model itself. A pass that prunes yields its new values in a "
                    f"Decision, and optimum-prune puts them in; so mend the pass, or make it a RecoverPass."
                )

    def check_looked_at(self, step: str) -> None:
        """Refuses a model that a hook has changed, which may not even put a parameter in the place of another.

        Args:
            step: the pass that the hook heard of.

        Raises:
            PluginError: naming the first weight.
        """
        there = dict(self._model.named_parameters())
        changed = [
            seen.name
            for seen in self._seen
            if (parameter := there.pop(seen.name, None)) is None
            or parameter is not seen.parameter()
            or self._changed(parameter, seen)
        ]
        if changed := [*changed, *there]:
            raise PluginError(
                f"A hook changed the weight '{changed[0]}' of the model before the pass '{step}', where it may only look. Mend the hook, or "
                f"make it a pass."
            )

    def _changed(self, parameter: Tensor, seen: _Seen) -> bool:
        same = (parameter.data_ptr(), parameter._version) == (seen.address, seen.version)
        return not same or not torch.equal(self._sample(parameter), seen.sample)

    def _sample(self, value: Tensor) -> Tensor:
        """Some elements of a tensor, bit for bit; the memory that they are read into is given back where it is mapped from a file."""
        flat = value.detach().reshape(-1) if value.is_contiguous() else value.detach().flatten()
        count = SAMPLES if self._weights is None else ON_DISK
        step = max(flat.numel() // count, 1)
        sample = flat[::step][:count].clone().view(torch.uint8)
        if self._weights is not None:
            self._weights.let_go(value)
        return sample


@contextmanager
def only_looked_at(model: nn.Module, step: str, models: Models | None) -> Iterator[None]:
    """Refuses what hooks change of a model's weights within a `with`, where they may only look; it is in evaluation mode behind it.

    Args:
        step: the pass that they hear of.
        models: where the weights are from, and lie.

    Raises:
        PluginError: naming the first weight.
    """
    check = models.check if models is not None else lambda: None
    check()
    untouched = Untouched(model, None if models is None else models.weights)
    yield
    check()
    untouched.check_looked_at(step)
    model.eval()
