"""What a model is trained on: windows of text in domains, in the order in which they come, and others that are held out."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from optimum_prune.evaluation.perplexity import perplexity
from optimum_prune.machine import processes
from optimum_prune.machine.progress import Progress
from optimum_prune.text.mixture import Mixture
from optimum_prune.text.windows import Domain, Windows, joined

if TYPE_CHECKING:
    from jaxtyping import Bool, Int
    from torch import Tensor
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class TrainingBatch:
    """Windows that run through a model at once while it is trained."""

    tokens: Int[Tensor, "windows length"]
    counted: Bool[Tensor, "windows length"]
    """Whether the prediction of a token counts; never of the first of a window."""
    places: Sequence[tuple[int, int]]
    """Of each window, its domain and its number there."""

    @property
    def predicted(self) -> Int[Tensor, " counted"]:
        """The tokens whose predictions count."""
        return self.tokens[self.counted]

    def predicting(self, logits: Tensor) -> Tensor:
        """Of logits or hidden states of all positions, those from which the counted tokens are predicted, as rows."""
        if bool(self.counted[:, 1:].all()):
            return logits[:, :-1].flatten(0, 1)
        found: Tensor = logits[:, :-1][self.counted[:, 1:]]
        return found


STATE = "course.json"
"""In each state of a training that is kept, what its Trainer does not know; written last."""
PREDICTIONS = "predictions"
"""The folder of what was computed of the dense model's predictions beforehand."""
Run = Callable[..., Any]
"""Runs a model on a batch, and gives what it puts out; keywords are handed on to the model."""


class Objective(Protocol):
    """What a model is trained for."""

    def loss(self, run: Run, batch: TrainingBatch) -> Tensor:
        """The mean over the predicted tokens of a batch, with gradients.

        Args:
            run: the model that is trained.
        """


@dataclass(frozen=True)
class Lesson:
    """What a model is trained on, and where that is kept for a run that is killed."""

    domains: tuple[Domain, ...]
    folder: Path
    seed: int = 0
    progress: Progress = Progress()
    update_every: int | None = None
    """Steps between two updates of the weights of domains; None where they stay."""
    logs: Path | None = None
    """Where trackers write whose logs are files; in its folder, if nowhere else."""

    @property
    def title(self) -> str:
        """What trackers call it."""
        return self.folder.name if self.logs is None else f"{self.logs.parent.stem}-{self.logs.name}"

    @property
    def measures_references(self) -> bool:
        """Whether the dense model is to tell what loss of each domain is to be reached."""
        return self.update_every is not None and any(domain.reference is None for domain in self.domains)

    def with_references(self, teacher: PreTrainedModel) -> Lesson:
        """The same with the teacher's losses as references, where none are given."""
        measured = [
            domain.reference or math.log(perplexity(teacher, domain.held_out, self.progress).value)
            for domain in self.domains
        ]
        domains = zip(self.domains, measured, strict=True)
        return replace(self, domains=tuple(replace(domain, reference=reference) for domain, reference in domains))

    @property
    def held_out(self) -> Windows:
        """The windows of all domains that are not trained on."""
        return joined([domain.held_out for domain in self.domains])

    def counted(self, places: Sequence[tuple[int, int]]) -> int:
        """How many predictions count in some windows."""
        numbers: dict[int, list[int]] = {}
        for domain, number in places:
            numbers.setdefault(domain, []).append(number)
        return sum(int(self.domains[each].windows.predicted[some, 1:].sum()) for each, some in numbers.items())

    @property
    def windows(self) -> int:
        """How many windows there are to train on."""
        return sum(len(domain.windows) for domain in self.domains)

    def mixture(self, windows: int) -> Mixture:
        """The order of the windows.

        Args:
            windows: of a step.
        """
        sizes = [len(domain.windows) for domain in self.domains]
        return Mixture(sizes, [domain.weight for domain in self.domains], windows, self.seed)

    def batch(self, places: Sequence[tuple[int, int]], device: torch.device) -> TrainingBatch:
        """Some windows, each named by its domain and its number there."""
        chosen = [(self.domains[domain].windows, number) for domain, number in places]
        tokens = torch.stack([windows.tokens[number] for windows, number in chosen])
        counted = torch.stack([windows.predicted[number] for windows, number in chosen])
        counted[:, 0] = False
        return TrainingBatch(tokens.long().to(device), counted.to(device), tuple(places))


def anything_kept(folder: Path) -> bool:
    """Whether there is something in the folder of a training that it goes on from: a whole state, or predictions."""
    return any(folder.glob(f"*/{STATE}")) or any(folder.glob(f"{PREDICTIONS}/*.safetensors"))


def let_go(lesson: Lesson | None) -> None:
    """Removes what is kept of a training that is done."""
    if lesson is not None and processes.first():
        shutil.rmtree(lesson.folder, ignore_errors=True)
