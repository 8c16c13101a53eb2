"""Continued pretraining: the whole model goes on learning to predict text (Xia et al., Sheared LLaMA, arXiv 2310.06694, stage 2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from optimum_prune.hooks.marker import hookimpl
from optimum_prune.passes.base import Pass
from optimum_prune.passes.trained import TrainedPass
from optimum_prune.training.objectives import Likelihood


@dataclass(frozen=True, kw_only=True)
class Pretrain(TrainedPass):
    """Trains the model on text, as it was trained before it was pruned."""

    name: ClassVar[str] = "pretrain"
    needs_teacher: ClassVar[bool] = False

    def objective(self, *_: object) -> Likelihood:
        return Likelihood()


@hookimpl
def passes() -> list[type[Pass]]:
    """The pass of this file."""
    return [Pretrain]
