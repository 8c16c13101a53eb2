"""Hidden states of the dense model as a goal beside its predictions (Muralidharan et al., arXiv 2407.14679)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from optimum_prune.training.lesson import Objective, Run, TrainingBatch
from optimum_prune.training.losses import relative_error

if TYPE_CHECKING:
    from optimum_prune.anatomy.decoder import Decoder


@dataclass(frozen=True)
class Nearness:
    """Another objective, and how near hidden states come to the teacher's: behind each layer, those in front of the next that was kept."""

    other: Objective
    """It runs the teacher too."""
    weight: float
    """How much the mean relative squared error of the hidden states counts."""
    decoder: Decoder
    teacher: Decoder
    layers: tuple[int, ...]
    """Of each layer of the model, the layer of the teacher that it was."""

    def loss(self, run: Run, batch: TrainingBatch) -> Tensor:
        """The other loss, and the mean over layers and counted tokens of the relative squared error."""
        goals = [index - 1 for index in (*self.layers[1:], len(self.teacher))]
        with _heard(self.decoder.modules) as found, _heard([self.teacher.modules[goal] for goal in goals]) as wanted:
            loss = self.other.loss(run, batch)
        for mine, its in zip(found, wanted, strict=True):
            loss = loss + self.weight / len(goals) * relative_error(batch.predicting(mine), batch.predicting(its))
        return loss


@contextmanager
def _heard(layers: Iterable[nn.Module]) -> Iterator[list[Tensor]]:
    """What these layers put out when they run within a `with`."""
    found: list[Tensor] = []

    def hear(_: nn.Module, __: Any, output: Any) -> None:
        found.append(output if isinstance(output, torch.Tensor) else output[0])

    hooks = [layer.register_forward_hook(hear) for layer in layers]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
