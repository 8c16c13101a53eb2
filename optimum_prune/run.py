"""The passes of a recipe, carried out one after the other: on a model in memory, then from folder to folder."""

from __future__ import annotations

import math
import shutil
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from optimum_prune import checkpoint, conversion, distributed, elsewhere, surgery
from optimum_prune.anatomy import Family, parameters
from optimum_prune.calibration import Calibration
from optimum_prune.cuts import Cuts
from optimum_prune.errors import SurgeryError, reason
from optimum_prune.evaluation import Perplexity, perplexity
from optimum_prune.measure import Meter, give_back
from optimum_prune.offload import Shelf, Store
from optimum_prune.options import as_plain
from optimum_prune.passes import FolderPass, Job, Outcome, PrunePass, Stage
from optimum_prune.plugins import Plugins
from optimum_prune.progress import Progress
from optimum_prune.recipe import Recipe
from optimum_prune.report import Change, Report
from optimum_prune.runtime import Expected, Runtime, compare, open_in_transformers
from optimum_prune.staging import Staging
from optimum_prune.subject import Subject, device_of
from optimum_prune.unfinished import Unfinished

if TYPE_CHECKING:
    from transformers import PreTrainedModel


SURPRISE = 0.05
"""By this fraction of a model's parameters, a pass may leave more or less than it foresaw."""


@dataclass(frozen=True)
class Texts:
    """What passes choose by, and what is reported on."""

    calibration: Calibration
    evaluation: Calibration | None


@dataclass(frozen=True)
class Run:
    """The passes of a recipe, carried out one after the other; after each that leaves a checkpoint, the report so far is kept."""

    recipe: Recipe
    texts: Texts
    plugins: Plugins
    staging: Staging
    unfinished: Unfinished
    progress: Progress
    meter: Meter

    @property
    def pruning(self) -> list[PrunePass]:
        """The passes that work on the model in memory."""
        return [step for step in self.recipe.passes if isinstance(step, PrunePass)]

    @property
    def conversions(self) -> list[FolderPass]:
        """The passes that go from folder to folder."""
        return [step for step in self.recipe.passes if isinstance(step, FolderPass)]

    def found(self, resume: bool) -> Report | None:
        """The report of what an earlier run finished, whose checkpoint becomes the result so far."""
        found = self.unfinished.find([(step.name, as_plain(step)) for step in self.recipe.passes], resume)
        if resume and not self.unfinished.folder.exists():
            self.progress.say(f"There is nothing to go on from at {self.unfinished.folder} yet; beginning.")
        if found is None or found.passes < len(self.pruning):
            return None
        self.staging.result = found.checkpoint
        report = Report.from_state(found.facts)
        self.progress.say(
            f"Going on from {found.checkpoint}, where {', '.join(step.name for step in report.passes)} are done."
        )
        return report

    def keep(self, report: Report) -> None:
        """Keeps the result so far, if the recipe goes on behind it."""
        if self.conversions:
            done = [(outcome.name, outcome.options) for outcome in report.passes]
            spent = replace(report, seconds=report.seconds + self.meter.seconds)
            self.staging.result = self.unfinished.save(self.staging.result, done, spent.to_state())

    def pruned(self, subject: Subject, family: Family) -> Report:
        """Loads, measures, prunes and saves the model, reloads it and measures it again. What it loads is gone afterwards."""
        settings, folder = self.recipe.settings, self.staging.result
        aside = self.staging.root / f"offloaded-{distributed.rank()}"
        store = Store(aside) if subject.offloads else None
        model = subject.load(store)
        _check_resident(model, subject.name)
        _check_rotary(model, subject.name)
        count, size = parameters(model), checkpoint.weight_bytes(model)
        journal = None  # several processes would have to read the same, piece by piece
        if distributed.size() == 1:
            journal = self.unfinished.journal([(step.name, as_plain(step)) for step in self.pruning])
        progress = replace(self.progress, journal=journal)
        measured = progress.once("perplexity", lambda: _plain(self.perplexity(model)))
        before = None if measured is None else Perplexity(**measured)
        give_back()
        calibration = replace(self.texts.calibration, shelf=self.shelf(subject.offloads))
        outcomes = [prune(step, model, family, calibration, self.plugins, progress, store) for step in self.pruning]
        if distributed.first():
            checkpoint.save(model, subject.tokenizer, folder, self.progress, store)
            for file in subject.companions:
                shutil.copy(file, folder)
        distributed.wait()
        probe, dtype = checkpoint.probe(model, self.texts.calibration.tokens), model.dtype
        spread = len(set((getattr(model, "hf_device_map", None) or {}).values())) > 1
        del model
        give_back()
        reloaded, verified = checkpoint.verify(
            folder,
            probe,
            dtype,
            "auto" if spread else device_of(settings),
            settings.trust_remote_code,
            self.progress,
            store,
        )
        give_back()
        after, left = self.perplexity(reloaded), parameters(reloaded)
        report = Report(
            model=subject.name,
            parameters=Change(count["total"], left["total"]),
            non_embedding_parameters=Change(count["non_embedding"], left["non_embedding"]),
            bytes=Change(size, checkpoint.bytes_on_disk(folder)),
            perplexity=Change(before, after) if before and after else None,
            passes=tuple(outcomes),
            calibration=_describe(self.texts.calibration, settings.seed),
            processes=distributed.size(),
            verified=verified,
            seconds=0.0,
            stock=not hasattr(reloaded.config, "pruned"),
        )
        if distributed.first():
            self.keep(report)
        return report

    def shelf(self, offloads: bool) -> Shelf | None:
        """Where activations are kept, if not all in memory."""
        budget = self.recipe.settings.shelf(offloads)
        return None if budget == math.inf else Shelf(self.staging.root / "activations", int(budget))

    def perplexity(self, model: PreTrainedModel) -> Perplexity | None:
        """Of a model in memory, if any is to be measured."""
        return None if self.texts.evaluation is None else perplexity(model, self.texts.evaluation, self.progress)

    def converted(self, report: Report) -> Report:
        """Carries out what is left of the passes that go from folder to folder, each on what the one before left."""
        expected = _Expectations(self.texts, device_of(self.recipe.settings))
        for position, step in enumerate(self.conversions, start=len(self.pruning)):
            if position < len(report.passes):
                expected.follow(step)
                continue
            self.plugins.manager.hook.before_pass(step=step, model=None)
            outcome, after = self.convert(step, expected)
            self.plugins.manager.hook.pass_finished(outcome=outcome)
            report = replace(report, passes=(*report.passes, outcome))
            if step.stage is Stage.QUANTIZE:
                report = replace(
                    report, bytes=Change(report.bytes.before, checkpoint.bytes_on_disk(self.staging.result))
                )
                if report.perplexity is not None and after is not None:
                    report = replace(report, perplexity=Change(report.perplexity.before, after))
            self.keep(report)
            expected.follow(step)
        return report

    def convert(self, step: FolderPass, expected: _Expectations) -> tuple[Outcome, Perplexity | None]:
        """Carries out one pass; the result becomes what it wrote, or holds that in a folder with its name."""
        settings, source = self.recipe.settings, self.staging.result
        target, room = self.staging.root / step.name, self.staging.root / f"{step.name}-room"
        for folder in (target, room):
            folder.mkdir()
        job = Job(
            source,
            target,
            self.texts.calibration,
            device_of(settings),
            self.progress,
            settings.seed,
            settings.trust_remote_code,
        )
        interpreter = elsewhere.interpreter_of(step)
        arguments = step, job, expected.of(source, step), expected.evaluation
        with self.progress.libraries(datasets=True):
            if interpreter is None:
                done, versions = conversion.carry_out(*arguments), elsewhere.versions(step)
            else:
                done, versions = elsewhere.carry_out(interpreter, *arguments, room)
        not_read = self.read_here(step, target, arguments[2]) if interpreter else None
        if step.stage is Stage.EXPORT:
            place = source / step.name
            shutil.rmtree(place, ignore_errors=True)
            target.rename(place)
        else:
            self.staging.result = target
        artefact = {
            "folder": step.name if step.stage is Stage.EXPORT else ".",
            "bytes": done.bytes,
            "tolerance": done.tolerance,
            **asdict(done.comparison),
            "perplexity": done.perplexity and done.perplexity.value,
            "tokens_per_second": done.perplexity and done.perplexity.tokens_per_second,
            "dtype": done.perplexity and done.perplexity.dtype,
            "interpreter": interpreter,
            "not_read_here": not_read,
            "versions": versions,
        }
        outcome = Outcome(
            step.name,
            step.stage,
            as_plain(step),
            done.seconds,
            done.peak_memory,
            evidence=(done.evidence,),
            artefact=artefact,
        )
        return outcome, done.perplexity

    def read_here(self, step: FolderPass, target: Path, expected: Expected) -> str | None:
        """Judges a checkpoint that another environment wrote as this one reads it too; or says why this one does not."""
        if step.stage is not Stage.QUANTIZE:
            return None
        try:
            with self.progress.libraries():
                comparison = compare(open_in_transformers(target, device_of(self.recipe.settings)), expected)
        except Exception as error:  # a library that only the other environment has, or one of another version
            return f"{type(error).__name__}: {reason(error)}"
        conversion.judge(step, comparison, "bfloat16")
        return None


class _Expectations:
    """What checkpoints compute that passes from folder to folder read, kept for the next that reads the same."""

    def __init__(self, texts: Texts, device: str) -> None:
        self._device = device
        self.evaluation = None if texts.evaluation is None else _whole(texts.evaluation)
        self._tokens = (self.evaluation or _whole(texts.calibration) or texts.calibration).tokens
        self._writer: FolderPass | None = None
        self._kept: tuple[Path, str, Expected] | None = None

    def follow(self, step: FolderPass) -> None:
        """Notes who wrote the checkpoint that is read from here on."""
        if step.stage is Stage.QUANTIZE:
            self._writer = step

    def of(self, source: Path, step: FolderPass) -> Expected:
        """What a pass must stay near to: exports in float32, whatever the checkpoint's dtype."""
        dtype = "float32" if step.stage is Stage.EXPORT else "auto"
        if self._kept is None or self._kept[:2] != (source, dtype):
            runtime: Runtime
            if self._writer is not None and not self._writer.missing():
                runtime = self._writer.open(source, self._device)
            else:
                runtime = open_in_transformers(source, self._device, dtype)
            self._kept = source, dtype, Expected.of(runtime, self._tokens)
        return self._kept[2]


def _whole(windows: Calibration) -> Calibration | None:
    """The windows without padding, which runtimes take; none if all have some."""
    kept = windows.mask.all(dim=1)
    return replace(windows, tokens=windows.tokens[kept], mask=windows.mask[kept]) if kept.any() else None


def _check_resident(model: PreTrainedModel, name: str) -> None:
    """Refuses a model some of whose weights accelerate loads only while they are used."""
    if missing := [weight for weight, value in model.named_parameters() if value.is_meta]:
        raise SurgeryError(
            f"{len(missing)} weights of {name}, such as {missing[0]}, are not in memory: its device_map leaves them on the CPU or on disk "
            f"until they are used. Load it onto devices that hold all of it, or give its folder and let optimum-prune --offload it."
        )


def _check_rotary(model: PreTrainedModel, name: str) -> None:
    """Refuses a model whose rotary frequencies were rounded, since no checkpoint holds them and a reload has them exact."""
    for buffer, value in model.named_buffers():
        if buffer.endswith("inv_freq") and value.dtype in (torch.bfloat16, torch.float16):
            raise SurgeryError(
                f"The rotary frequencies of {name} are rounded to {value.dtype}, as `model.to(dtype)` does, so it computes something "
                f"else than what can be saved. Load it with from_pretrained(..., dtype=...) instead."
            )


def prune(
    step: PrunePass,
    model: PreTrainedModel,
    family: Family,
    calibration: Calibration,
    plugins: Plugins,
    progress: Progress,
    store: Store | None = None,
) -> Outcome:
    """Carries out one pruning pass on a model, in place: each decision is cut before the next is asked for.

    Args:
        store: where the model's weights are, if on disk.

    Raises:
        SurgeryError: the model's shape is not what the pass foresaw.
    """
    if distributed.first():
        plugins.manager.hook.before_pass(step=step, model=model)
    before = family.shape(model)
    expected = step.foresee(before)
    cuts, evidence = Cuts(), []
    decide, journal = partial(step.decide, model, family, calibration, progress), progress.journal
    with Meter() as meter:
        for decision in decide() if journal is None else journal.decisions(step.name, decide):
            distributed.agreed(decision.cuts)
            surgery.carry_out(model, family, decision)
            if store is not None:
                store.settle(model)
            cuts = cuts.merge(decision.cuts)
            evidence.append(decision.evidence)
        surgery.settle(model, family)
    found = family.shape(model)
    # Of layers that are not alike, a search decides which go, and so how large what is left is.
    larger = before.even and abs(found.parameters - expected.parameters) > SURPRISE * before.parameters
    if step.foresees_layers and (len(found.layers) != len(expected.layers) or larger):
        raise SurgeryError(
            f"The pass '{step.name}' left a model of {found.describe()} where it foresaw {expected.describe()}. Please report it."
        )
    outcome = Outcome(step.name, step.stage, as_plain(step), meter.seconds, meter.peak_memory, cuts, tuple(evidence))
    if distributed.first():
        plugins.manager.hook.pass_finished(outcome=outcome)
    return outcome


def _plain(perplexity: Perplexity | None) -> dict[str, Any] | None:
    return None if perplexity is None else asdict(perplexity)


def _describe(calibration: Calibration, seed: int) -> dict[str, Any]:
    windows, length = calibration.tokens.shape
    return {"text": calibration.source, "windows": windows, "length": length, "bos": calibration.bos, "seed": seed}
