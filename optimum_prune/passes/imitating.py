"""Passes that train a model to predict what the dense model does, which is asked step by step, or once beforehand."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from optimum_prune.options import option
from optimum_prune.passes.trained import TrainedPass
from optimum_prune.passes.training import TOKENS
from optimum_prune.training.lesson import PREDICTIONS
from optimum_prune.training.objectives import Imitation
from optimum_prune.training.predictions import Asked, Place, Precomputed

if TYPE_CHECKING:
    from optimum_prune.anatomy.shape import Shape
    from optimum_prune.anatomy.workload import Workload
    from optimum_prune.passes.recover import Recovery
    from optimum_prune.training.lesson import Lesson, Objective
    from optimum_prune.training.schedule import Schedule

ROUNDS = 1.5
"""Where each window is trained on more often, it pays to compute what the dense model predicts beforehand."""
PREDICTED_BYTES = 6
"""Of a token's probability, and of which token it is."""


@dataclass(frozen=True, kw_only=True)
class ImitatingPass(TrainedPass):
    """A pass that trains towards the dense model's predictions."""

    alpha: float = option(
        "How much the likelihood of the text counts; the dense model's predictions count for the rest.",
        0.5,
        at_least=0,
        at_most=1,
    )
    temperature: float = option("How soft the predictions are that are compared.", 1.0, above=0)
    precompute: bool | None = option(
        "Compute the dense model's predictions beforehand; if not given, where windows are trained on several times.",
        None,
    )
    top: int = option(
        "How many tokens of each of these predictions are kept; all others count as one.", 100, at_least=1
    )

    def objective(self, recovery: Recovery, lesson: Lesson, schedule: Schedule) -> Objective:
        """The divergence of the dense model's predictions from the pruned model's."""
        if not self.precomputes(schedule, lesson):
            return Imitation(Asked(recovery.teacher.model.eval()), self.alpha, self.temperature)
        kept = Precomputed(lesson.folder / PREDICTIONS, self.top, self.temperature)
        kept.compute(lambda: recovery.teacher.model.eval(), lesson, _places(lesson, schedule), schedule.at_once)
        recovery.let_teacher_go()
        return Imitation(kept, self.alpha, self.temperature)

    def keeps(self, shape: Shape, work: Workload) -> float:
        """The dense model's predictions too, where they are computed beforehand."""
        tokens = (self.tokens_wanted() or TOKENS) if self.precompute else 0
        return super().keeps(shape, work) + tokens * self.top * PREDICTED_BYTES

    def precomputes(self, schedule: Schedule, lesson: Lesson) -> bool:
        """Whether the dense model is asked beforehand."""
        return schedule.rounds(lesson.windows) > ROUNDS if self.precompute is None else self.precompute


def _places(lesson: Lesson, schedule: Schedule) -> Iterator[Place]:
    """The windows that are trained on, as far as that can be known."""
    if schedule.steps is None or lesson.update_every is not None:
        for number, domain in enumerate(lesson.domains):
            yield from ((number, window) for window in range(len(domain.windows)))
        return
    mixture = lesson.mixture(schedule.windows)
    for step in range(schedule.steps):
        yield from mixture.of_step(step)
