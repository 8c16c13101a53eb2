"""Recipes whose passes train a tiny model, and what they left."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from optimum_prune import Pass, Recipe, Report, Settings, Text, Training
from optimum_prune.training.watch import Watch


def recipe_on(
    model: Path, chosen: Path, taught: Path, *passes: Pass, training: Training | None = None, **settings: Any
) -> Recipe:
    """A recipe on a model: one text to choose by, another to train on."""
    return Recipe(
        passes=passes,
        calibration=Text(text=str(chosen), samples=16, length=16),
        evaluation=Text(samples=4),
        training=training or Training(text=str(taught), length=32),
        settings=Settings(model=str(model), device="cpu", **settings),
    )


def digests(folder: Path) -> dict[str, str]:
    """Of the files of weights."""
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.glob("*.safetensors")}


def trained(report: Report, position: int = -1) -> dict[str, Any]:
    """What a pass tells of its training."""
    return report.passes[position].plain_evidence()[0]["trained"]


@contextmanager
def dying(step: int) -> Iterator[None]:
    """Lets a training within a `with` be interrupted at the end of a step, which it must come to."""
    seen = Watch.on_step_end

    def die(self: Watch, args: Any, state: Any, control: Any, **rest: Any) -> None:
        if state.global_step == step:
            raise KeyboardInterrupt
        seen(self, args, state, control, **rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Watch, "on_step_end", die)
        with pytest.raises(KeyboardInterrupt):
            yield
