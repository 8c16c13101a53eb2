"""What a model is trained for: to predict the text, or to predict what its teacher does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from optimum_prune.training.lesson import Run, TrainingBatch
from optimum_prune.training.losses import Kept, divergence, divergence_of_kept, text_loss

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Likelihood:
    """The text itself: continued pretraining."""

    def loss(self, run: Run, batch: TrainingBatch) -> Tensor:
        """The mean negative log-likelihood of the counted tokens."""
        logits = batch.predicting(run(batch).logits)
        return text_loss(logits, batch.predicted) / len(logits)


Teacher = Callable[[TrainingBatch], "Tensor | Kept"]
"""From a batch, what the teacher predicts there: its logits as rows, or what was kept of them."""


@dataclass(frozen=True)
class Imitation:
    """A teacher's predictions: distillation (Hinton et al., arXiv 1503.02531)."""

    teacher: Teacher
    alpha: float = 0.0
    """How much the text itself counts; the teacher counts for the rest."""
    temperature: float = 1.0

    def loss(self, run: Run, batch: TrainingBatch) -> Tensor:
        """The mean divergence of the teacher's predictions from the model's, and of the likelihood its part."""
        with torch.no_grad():
            taught = self.teacher(batch)
        logits = batch.predicting(run(batch).logits)
        if isinstance(taught, Kept):
            apart = divergence_of_kept(logits, taught, self.temperature)
        else:
            apart = divergence(logits, taught, self.temperature)
        total = (1 - self.alpha) * apart
        if self.alpha:
            total = total + self.alpha * text_loss(logits, batch.predicted)
        return total / len(logits)
