"""A run: a plan while it is carried out, and what its parts have in common."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from optimum_prune.calibration.calibration import Calibration, NoJournal, Once
from optimum_prune.hooks.plugins import Plugins
from optimum_prune.machine import processes
from optimum_prune.machine.activation_store import ActivationStore, InMemory, MappedActivations
from optimum_prune.machine.memory import Meter
from optimum_prune.machine.progress import Progress
from optimum_prune.options import as_plain
from optimum_prune.passes.base import Pass
from optimum_prune.plan.plan import Plan
from optimum_prune.recipe import Recipe, Settings
from optimum_prune.report.report import Report
from optimum_prune.run.fingerprints import code_fingerprint
from optimum_prune.run.output import HiddenOutput
from optimum_prune.run.unfinished import Unfinished
from optimum_prune.text.windows import Texts
from optimum_prune.training.lesson import Lesson


@dataclass(frozen=True)
class Run:
    """A plan, the texts that were drawn for it, and where what comes of it is written."""

    plan: Plan
    texts: Texts
    plugins: Plugins
    output: HiddenOutput
    unfinished: Unfinished
    progress: Progress
    meter: Meter
    """That measures the whole run."""

    @property
    def recipe(self) -> Recipe:
        """The recipe that is carried out."""
        return self.plan.recipe

    @property
    def settings(self) -> Settings:
        """Those of the recipe."""
        return self.plan.recipe.settings

    @property
    def model_fingerprint(self) -> str | None:
        """The fingerprint of the model's files when the run began; None if nobody can tell."""
        return self.unfinished.identity["the model"]

    def folder(self, name: str) -> Path:
        """The path of a folder for this process, gone when the run ends."""
        return self.output.folder / f"{name}-{processes.rank()}"

    def calibration(self) -> Calibration:
        """What the passes on the model in memory choose by, with the journal of what they compute."""
        tokenizer = self.plan.source.tokenizer
        return Calibration(self.texts.calibration, self._activations(), self.progress, self._journal(), tokenizer)

    def _journal(self) -> Once:
        if processes.size() > processes.here():  # on several machines, which may have no folder in common
            return NoJournal()
        journal = self.unfinished.journal(described(self.recipe.in_memory))
        if journal is not None and journal.damaged:
            self.progress.say(
                f"A part of what is kept in {self.unfinished.folder} is damaged, so what followed on it is computed again."
            )
        return NoJournal() if journal is None else journal

    def lesson(self, step: Pass) -> Lesson | None:
        """What a pass is trained on; None for one that is not."""
        if not step.trains:
            return None
        number = next(number for number, each in enumerate(self.recipe.in_memory) if each is step)
        training, output = self.recipe.training, self.unfinished.output
        return Lesson(
            self.texts.training,
            (self.unfinished.training() or self.output.folder / "training") / f"{number}-{step.name}",
            self.settings.seed,
            self.progress,
            training.update_every if training.dynamic else None,
            output.with_name(f"{output.name}.logs") / f"{number}-{step.name}",
        )

    def _activations(self) -> ActivationStore:
        budget = self.plan.activation_budget
        return InMemory() if budget == math.inf else MappedActivations(self.folder("activations"), int(budget))

    def found(self, resume: bool) -> Report | None:
        """The report of what an earlier run finished, whose checkpoint becomes the result so far.

        Args:
            resume: whether to refuse to begin anew where another run ended early.
        """
        found = self.unfinished.find(described(self.recipe.passes), resume)
        if resume and not self.unfinished.folder.exists():
            self.progress.say(f"There is nothing to go on from at {self.unfinished.folder} yet; beginning.")
        if self.unfinished.remark:
            self.progress.say(self.unfinished.remark)
        if found is None or found.passes < len(self.recipe.in_memory):
            return None
        try:
            report = Report.from_state(found.facts)
        except Exception:  # whatever it is, nobody of ours wrote it
            self.unfinished.disregard("its report cannot be read")
            self.progress.say(self.unfinished.remark)
            return None
        self.output.result = found.checkpoint
        self.progress.say(
            f"Going on from {found.checkpoint}, where {', '.join(step.name for step in report.passes)} are done."
        )
        return report

    def keep(self, report: Report) -> None:
        """Keeps the result so far, if the recipe goes on behind it."""
        if self.recipe.conversions:
            done = described(self.recipe.passes[: len(report.passes)])
            spent = replace(report, seconds=report.seconds + self.meter.seconds)
            self.output.result = self.unfinished.save(self.output.result, done, spent.to_state())


def described(steps: Sequence[Pass]) -> list[tuple[str, dict[str, Any], str]]:
    """Names and options of passes, and the fingerprints of their code."""
    return [(step.name, as_plain(step), code_fingerprint(type(step))) for step in steps]
