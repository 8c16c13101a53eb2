"""What reaches each matrix of a decoder layer, summed over tokens as a method needs it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from optimum_prune.machine import processes

if TYPE_CHECKING:
    from optimum_prune.anatomy.matrices import Matrix
    from optimum_prune.calibration.stream import Batch
    from optimum_prune.calibration.visit import Hearer, LayerVisit


class Statistic(Protocol):
    """Something that is summed over tokens."""

    @property
    def tokens(self) -> int:
        """Over how many, in all processes."""

    def add(self, activations: Tensor, /) -> None:
        """Adds these rows."""


S = TypeVar("S", bound=Statistic)


def summed_inputs(
    visit: LayerVisit, matrices: Sequence[Matrix], make: Callable[[int, torch.device], S]
) -> dict[str, list[S]]:
    """Of each matrix of a layer, by its parameter, a statistic of what reaches it, one for each of its maps; padding is left out.

    Matrices that are given the same have theirs in common. The layer runs once as it is.

    Args:
        make: a statistic of so many features on a device.
    """
    first = processes.broadcast_from_first(lambda: first_with_same_inputs(visit, matrices))
    found: dict[str, list[S]] = {}
    heard = []
    for matrix in matrices:
        if first[matrix.parameter] == matrix.parameter:
            maps = visit.layer.projection(matrix.parameter).maps
            found[matrix.parameter] = [make(weight.shape[1], weight.device) for weight in maps]
            heard.append((matrix.module, _adding(matrix, found[matrix.parameter])))
    visit.listen(heard)
    return {matrix.parameter: found[first[matrix.parameter]] for matrix in matrices}


def _adding(matrix: Matrix, statistics: Sequence[Statistic]) -> Hearer:
    """Adds what reaches a matrix."""

    def add(batch: Batch, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        if matrix.read is None:
            statistics[0].add(batch.unpadded(args[0]))
            return
        for number, rows in matrix.read(module, args, kwargs, batch.mask):
            statistics[number].add(rows)

    return add


def first_with_same_inputs(visit: LayerVisit, matrices: Sequence[Matrix]) -> dict[str, str]:
    """Of each matrix, the first that is given the same tensor, maybe itself; found on one batch."""
    given: list[tuple[Tensor, str]] = []  # the tensors are held: an address would be used again
    found = {matrix.parameter: matrix.parameter for matrix in matrices}

    def hear(parameter: str, _: Batch, __: nn.Module, args: tuple[Any, ...], ___: Mapping[str, Any]) -> None:
        for tensor, other in given:
            if tensor is args[0]:
                found[parameter] = other
                return
        given.append((args[0], parameter))

    visit.listen(
        [(matrix.module, partial(hear, matrix.parameter)) for matrix in matrices if matrix.read is None], batches=1
    )
    return found
