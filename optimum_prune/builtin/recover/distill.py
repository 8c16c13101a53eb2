"""Distillation: the whole model learns to predict what the dense model does.

The loss is the Kullback-Leibler divergence of the dense model's predictions from the pruned model's (Hinton et al., arXiv 1503.02531;
Muralidharan et al., arXiv 2407.14679, who find it alone better than with the likelihood of the text beside it). What the dense model
predicts is asked of it step by step, or computed once beforehand, so that only the model that is trained needs memory and time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from optimum_prune.errors import RecipeError
from optimum_prune.hooks.marker import hookimpl
from optimum_prune.options import option
from optimum_prune.passes.base import Pass
from optimum_prune.passes.imitating import ImitatingPass
from optimum_prune.training.hidden import Nearness

if TYPE_CHECKING:
    from optimum_prune.passes.recover import Recovery
    from optimum_prune.training.lesson import Lesson, Objective
    from optimum_prune.training.schedule import Schedule


@dataclass(frozen=True, kw_only=True)
class Distill(ImitatingPass):
    """Trains the model to predict what the dense model does."""

    name: ClassVar[str] = "distill"
    hidden: float = option(
        "How much the relative squared error of the hidden states behind the layers counts beside that.",
        0.0,
        at_least=0,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.hidden and self.precompute:
            raise RecipeError(
                f"{self.name} is to compare hidden states, and to compute beforehand what the dense model predicts, of which it keeps no hidden "
                f"states. Leave out 'hidden', or 'precompute'."
            )

    @property
    def compares_hidden(self) -> bool:  # type: ignore[override]
        """Whether hidden states count."""
        return self.hidden > 0

    def precomputes(self, schedule: Schedule, lesson: Lesson) -> bool:
        return not self.hidden and super().precomputes(schedule, lesson)

    def objective(self, recovery: Recovery, lesson: Lesson, schedule: Schedule) -> Objective:
        plain = super().objective(recovery, lesson, schedule)
        if not self.hidden:
            return plain
        return Nearness(plain, self.hidden, recovery.decoder, recovery.teacher, recovery.layers)


@hookimpl
def passes() -> list[type[Pass]]:
    """The pass of this file."""
    return [Distill]
