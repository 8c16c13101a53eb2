"""A teacher's predictions: asked of it whenever they are needed, or computed once and kept on disk, so that only the student is in memory.

What is kept of each prediction are the likeliest tokens; all others count as one. Of 100 tokens that is a hundredth of the logits, and
the divergence from it tells nearly the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file

from optimum_prune.errors import CheckpointError
from optimum_prune.machine import processes, tensor_files
from optimum_prune.machine.whole_files import whole
from optimum_prune.training.lesson import Lesson, TrainingBatch
from optimum_prune.training.losses import Kept, keep_likeliest

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor, nn

PIECE = 64
"""Windows of a file."""

Place = tuple[int, int]
"""A domain and the number of a window there."""


@dataclass(frozen=True)
class Asked:
    """The predictions of a teacher in memory."""

    teacher: nn.Module

    def __call__(self, batch: TrainingBatch) -> Float[Tensor, "n v"]:
        """Its logits, as rows."""
        return batch.predicting(self.teacher(input_ids=batch.tokens, use_cache=False).logits)


class Precomputed:
    """What was kept of a teacher's predictions for windows of a lesson, in files, by window.

    Args:
        folder: of the files; those that are there already are taken for what they are called.
        count: tokens that are kept of each prediction.
        temperature: at which predictions will be compared.
    """

    def __init__(self, folder: Path, count: int, temperature: float) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._count = count
        self._temperature = temperature
        self._found: dict[Place, tuple[Tensor, Tensor]] = {}

    @torch.no_grad()
    def compute(
        self, open_teacher: Callable[[], nn.Module], lesson: Lesson, places: Iterable[Place], at_once: int
    ) -> None:
        """Computes what is not there yet.

        Args:
            open_teacher: gives the model that predicts; it is not asked where everything is there.
            places: the windows that will be asked for.
            at_once: so many run through the teacher at a time.
        """
        every = sorted(set(places))
        pieces = [every[start : start + PIECE] for start in range(0, len(every), PIECE)]
        tracked = lesson.progress.track(enumerate(pieces), "The teacher's predictions", len(pieces))
        for number, piece in tracked:
            file = self._folder / f"predictions-{number:06}.safetensors"
            if number % processes.size() == processes.rank() and not _is_whole(file):
                self._write(file, open_teacher(), lesson, piece, at_once)
        processes.wait()
        for number, piece in enumerate(pieces):
            kept = load_file(self._folder / f"predictions-{number:06}.safetensors")
            for row, place in enumerate(piece):
                self._found[place] = kept["log_probabilities"][row], kept["tokens"][row]

    def _write(self, file: Path, teacher: nn.Module, lesson: Lesson, piece: Sequence[Place], at_once: int) -> None:
        device = next(teacher.parameters()).device
        kept: list[Kept] = []
        for start in range(0, len(piece), at_once):
            batch = lesson.batch(piece[start : start + at_once], device)
            logits = teacher(input_ids=batch.tokens, use_cache=False).logits[:, :-1]
            kept += [keep_likeliest(window, self._count, self._temperature) for window in logits]
        values = torch.stack([each.log_probabilities for each in kept]).to(torch.float16).cpu()
        tokens = torch.stack([each.tokens for each in kept]).to(torch.int32).cpu()
        with whole(file) as partial:
            tensor_files.write({"log_probabilities": values, "tokens": tokens}, partial)

    def __call__(self, batch: TrainingBatch) -> Kept:
        """What was kept for the windows of a batch, as rows."""
        values, tokens = zip(*(self._found[place] for place in batch.places), strict=True)
        counted = batch.counted[:, 1:]
        device = counted.device
        return Kept(torch.stack(values).to(device)[counted], torch.stack(tokens).to(device)[counted])


def _is_whole(file: Path) -> bool:
    try:
        tensor_files.header(file)
    except CheckpointError:  # it is computed again then
        return False
    return True
