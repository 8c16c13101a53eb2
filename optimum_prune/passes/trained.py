"""Passes that train a pruned model towards an objective of their own."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from optimum_prune.passes.recover import RecoverPass, Recovery
from optimum_prune.passes.training import TrainingPass
from optimum_prune.surgery.cuts import NOTE

if TYPE_CHECKING:
    from optimum_prune.anatomy.decoder import Decoder
    from optimum_prune.training.lesson import Lesson, Objective
    from optimum_prune.training.schedule import Schedule
    from optimum_prune.training.student import Student


@dataclass(frozen=True, kw_only=True)
class TrainedPass(TrainingPass, RecoverPass):
    """A pass that recovers a model by training."""

    @abstractmethod
    def objective(self, recovery: Recovery, lesson: Lesson, schedule: Schedule) -> Objective:
        """What the model is trained for."""

    def student(self, decoder: Decoder, lesson: Lesson) -> Student:
        """What of the model is trained."""
        from optimum_prune.training.student import Student

        parameters = sum(value.numel() for value in decoder.model.parameters())
        float32 = self.in_float32(parameters)
        return Student(decoder.model, lesson.folder, float32=float32, zeros_stay=self.keep_zeros)

    def recover(self, recovery: Recovery) -> Mapping[str, Any]:
        """Trains the pruned model."""
        from optimum_prune.training.engine import train  # transformers' Trainer takes long to import

        lesson = recovery.lesson
        assert lesson is not None, "a pass that trains is given a lesson"
        if lesson.measures_references:
            lesson = lesson.with_references(recovery.teacher.model)
        schedule = self.scheduled(recovery.decoder, lesson)
        objective = self.objective(recovery, lesson, schedule)
        found = dict(train(self.student(recovery.decoder, lesson), lesson, objective, schedule))
        return {NOTE: found.pop(NOTE), "trained": found}
