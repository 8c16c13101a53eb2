"""Distillation: the whole model learns to predict what the dense model does.

The loss is the Kullback-Leibler divergence of the dense model's predictions from the pruned model's (Hinton et al., arXiv 1503.02531;
Muralidharan et al., arXiv 2407.14679, who find it alone better than with the likelihood of the text beside it). What the dense model
predicts is asked of it step by step, or computed once beforehand, so that only the model that is trained needs memory and time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from optimum_prune.hooks.marker import hookimpl
from optimum_prune.options import option
from optimum_prune.passes.base import Pass
from optimum_prune.passes.recover import Recovery
from optimum_prune.passes.trained import TrainedPass
from optimum_prune.training.objectives import Imitation
from optimum_prune.training.predictions import Asked, Place, Precomputed

if TYPE_CHECKING:
    from optimum_prune.training.lesson import Lesson
    from optimum_prune.training.schedule import Schedule

ROUNDS = 1.5
"""Where each window is trained on more often, it pays to compute what the dense model predicts beforehand."""


@dataclass(frozen=True, kw_only=True)
class Distill(TrainedPass):
    """Trains the model to predict what the dense model does."""

    name: ClassVar[str] = "distill"
    alpha: float = option(
        "How much the likelihood of the text counts beside the dense model's predictions.", 0.0, at_least=0, at_most=1
    )
    temperature: float = option("How soft the predictions are that are compared.", 1.0, above=0)
    precompute: bool | None = option(
        "Compute the dense model's predictions beforehand; if not given, where windows are trained on several times.",
        None,
    )
    top: int = option(
        "How many tokens of each of these predictions are kept; all others count as one.", 100, at_least=1
    )

    def objective(self, recovery: Recovery, lesson: Lesson, schedule: Schedule) -> Imitation:
        teacher = recovery.teacher.model.eval()
        precompute = self.precompute
        if precompute is None:
            precompute = schedule.rounds(lesson.windows) > ROUNDS
        if not precompute:
            return Imitation(Asked(teacher), self.alpha, self.temperature)
        kept = Precomputed(lesson.folder / "predictions", self.top, self.temperature)
        kept.compute(teacher, lesson, _places(lesson, schedule), schedule.at_once)
        return Imitation(kept, self.alpha, self.temperature)


def _places(lesson: Lesson, schedule: Schedule) -> Iterator[Place]:
    """The windows that are trained on, as far as that can be known."""
    if schedule.steps is None or lesson.update_every is not None:
        for number, domain in enumerate(lesson.domains):
            yield from ((number, window) for window in range(len(domain.windows)))
        return
    mixture = lesson.mixture(schedule.windows)
    for step in range(schedule.steps):
        yield from mixture.of_step(step)


@hookimpl
def passes() -> list[type[Pass]]:
    """The pass of this file."""
    return [Distill]
