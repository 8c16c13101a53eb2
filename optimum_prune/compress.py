"""The loop: a recipe's passes in order, then a checkpoint that was reloaded, measured and reported."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from optimum_prune import checkpoint, conversion, elsewhere, surgery
from optimum_prune.anatomy import Family, find_family, parameters
from optimum_prune.calibration import Calibration, draw
from optimum_prune.cuts import Cuts
from optimum_prune.errors import OutputError, RecipeError, SurgeryError, reason
from optimum_prune.evaluation import Perplexity, perplexity
from optimum_prune.measure import Meter
from optimum_prune.options import as_plain
from optimum_prune.passes import FolderPass, Job, Outcome, Pass, PrunePass, Stage
from optimum_prune.plugins import Plugins
from optimum_prune.plugins import load as load_plugins
from optimum_prune.progress import Progress
from optimum_prune.prospect import Prospect
from optimum_prune.recipe import Recipe, Settings
from optimum_prune.report import Change, Report
from optimum_prune.runtime import Expected, Runtime, open_in_transformers
from optimum_prune.shape import Shape
from optimum_prune.staging import Staging, check_output, staged
from optimum_prune.unfinished import Unfinished, files_fingerprint, windows_fingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


SURPRISE = 0.05
"""By this fraction of a model's parameters, a pass may leave more or less than it foresaw."""


@dataclass(frozen=True)
class Subject:
    """The model that is to be compressed; opened, but loaded only when everything else is known to be right."""

    name: str
    source: str | None
    """Its folder, Hub id or file, if it comes from one."""
    config: PreTrainedConfig
    tokenizer: PreTrainedTokenizerBase | None
    load: Callable[[], PreTrainedModel]
    companions: tuple[Path, ...] = ()
    """Files that belong beside the weights, whatever is done to them."""
    in_memory: bool = False
    """Whether its weights are the caller's, so that nothing tells whether they were changed."""


@dataclass(frozen=True)
class Texts:
    """What passes choose by, and what is reported on."""

    calibration: Calibration
    evaluation: Calibration | None


def compress(
    recipe: Recipe,
    output: str | Path,
    *,
    subject: Subject | None = None,
    texts: Texts | None = None,
    overwrite: bool = False,
    resume: bool = False,
    hooks: Iterable[object] = (),
    progress: Progress | None = None,
) -> Report:
    """Carries out a recipe and writes the compressed model, its report and its recipe to a folder.

    Args:
        recipe: what to do.
        output: the folder; written elsewhere and moved into place when everything is done.
        subject: the model, instead of the one that the recipe's settings name.
        texts: token windows, instead of those that the recipe describes.
        overwrite: replace an output folder that exists.
        resume: insist that a run that ended early goes on; otherwise one does if there is one, of this model, text and passes.
        hooks: objects with `before_pass` or `pass_finished` marked `@hookimpl`, such as a tracker.
        progress: where to show progress; nowhere if not given.

    Raises:
        OptimumPruneError: whatever a user can mend; then there is no output folder. What was finished by then, if the recipe goes
            on after pruning, is kept beside it, and the message says where.
    """
    progress = progress or Progress()
    plugins = load_plugins(hooks)
    check_output(Path(output), overwrite)
    subject = subject or open_subject(recipe.settings, progress, families=plugins.families)
    with Meter() as meter, staged(Path(output), overwrite, subject.source) as staging:
        family = find_family(subject.config, plugins.families)
        shape = family.shape(meta_model(subject.config, recipe.settings.trust_remote_code))
        foreseen = foresee(recipe.passes, shape)[-1]
        check_conversions(recipe.passes, Prospect(subject.config, family, foreseen))
        with progress.libraries():
            texts = texts or _draw(recipe, subject, family, plugins)
        _check_texts(texts, family.text_config(subject.config))
        _check_disk(staging.root, foreseen.parameters * checkpoint.item_size(subject.config, recipe.settings.dtype))
        unfinished = Unfinished(Path(output), _identity(recipe.settings, subject, texts))
        run = _Run(recipe, texts, plugins, staging, unfinished, progress, meter)
        with unfinished.told():
            report = run.found(resume) or run.pruned(subject, family)
            report = run.converted(report)
        report = replace(report, seconds=report.seconds + meter.seconds)
        _write(staging.result, replace(recipe, settings=replace(recipe.settings, model=subject.name)), report)
    unfinished.remove()
    return report


def open_subject(
    settings: Settings, progress: Progress, *, families: Iterable[Family] | None = None, quantized: bool = False
) -> Subject:
    """The model that settings name, opened.

    Args:
        families: those of which the model must be; any model will do if not given.
        quantized: whether a model of packed weights will do.

    Raises:
        RecipeError: they name none.
        CheckpointError: it cannot be opened.
        FamilyError: it is of none of the families.
    """
    opened = open_model(settings, quantized=quantized)
    if families is not None:
        find_family(opened.config, families)
    load = partial(checkpoint.load, opened, settings.dtype, device_of(settings), progress)
    return Subject(opened.name, opened.source, opened.config, opened.tokenizer(), load, opened.companions())


def open_model(settings: Settings, *, quantized: bool = False) -> checkpoint.Checkpoint:
    """The checkpoint that settings name.

    Raises:
        RecipeError: they name none.
        CheckpointError: it cannot be opened.
    """
    if settings.model is None:
        raise RecipeError("No model is named. Give one with --model, or as 'model' in the recipe.")
    return checkpoint.open_checkpoint(settings.model, settings.trust_remote_code, quantized=quantized)


def device_of(settings: Settings) -> str:
    """The device to compute on.

    Raises:
        RecipeError: torch does not know it, or does not see it here.
    """
    if settings.device == "auto":
        found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return str(found) if found is not None else "cpu"
    try:
        torch.empty(0, device=settings.device)
    except (RuntimeError, AssertionError, ValueError) as error:
        raise RecipeError(
            f"The device '{settings.device}' cannot be used: {reason(error)} Use cpu, or a device that torch sees here."
        ) from error
    return settings.device


def foresee(steps: Sequence[Pass], shape: Shape) -> list[Shape]:
    """The shape before the first pass and after each, from the options alone.

    Raises:
        RecipeError: a pass asks for more than a model of its shape has.
    """
    shapes = [shape]
    for step in steps:
        shapes.append(step.foresee(shapes[-1]) if isinstance(step, PrunePass) else shapes[-1])
    return shapes


def check_conversions(steps: Sequence[Pass], prospect: Prospect) -> None:
    """Lets passes from folder to folder look at what they will get.

    Raises:
        RecipeError: one could not convert it.
    """
    for step in steps:
        if not isinstance(step, FolderPass):
            continue
        if prospect.odd and not step.takes_odd:
            raise RecipeError(
                f"'{step.name}' cannot read a model whose layers differ in shape or lack a block, as the passes before it leave it. Prune every "
                f"layer alike (osscar without `allocation: global` and `protect`; depth; block-pruner with `stock: true`), or leave "
                f"'{step.name}' out."
            )
        step.check(prospect)


# Before the weights are read


def _identity(settings: Settings, subject: Subject, texts: Texts) -> dict[str, str | None]:
    """What must be equal for a run to go on where another stopped, each by the word for it."""
    path = Path(subject.name).expanduser()
    if subject.in_memory:
        model = None
    elif path.exists():
        model = files_fingerprint(path)
    else:
        model = f"{subject.name} {getattr(subject.config, '_commit_hash', None)}"
    return {
        "the model": model,
        "the calibration": windows_fingerprint(texts.calibration),
        "the evaluation": windows_fingerprint(texts.evaluation),
        "dtype, device or seed": f"{settings.dtype} {device_of(settings)} {settings.seed}",
        "the version of optimum-prune": version("optimum-prune"),
    }


def _draw(recipe: Recipe, subject: Subject, family: Family, plugins: Plugins) -> Texts:
    if subject.tokenizer is None:
        raise RecipeError(
            f"{subject.name} has no tokenizer to read a text with. Give the windows of tokens themselves."
        )
    calibration, evaluation = draw(
        recipe.calibration,
        recipe.evaluation,
        subject.tokenizer,
        plugins.sources,
        seed=recipe.settings.seed,
        limit=length_limit(family.text_config(subject.config)),
    )
    return Texts(calibration, evaluation)


def length_limit(config: PreTrainedConfig) -> int:
    """Tokens that a model takes at once, by its config."""
    return getattr(config, "max_position_embeddings", None) or 2**31


def _check_texts(texts: Texts, config: PreTrainedConfig) -> None:
    largest = max(
        int(windows.tokens.max()) for windows in (texts.calibration, texts.evaluation) if windows is not None
    )
    if largest >= config.vocab_size:
        raise RecipeError(
            f"The text has the token {largest}, and the model knows {config.vocab_size}. Use the tokenizer that belongs to the model."
        )


def _check_disk(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OutputError(
            f"The compressed model takes {needed / 1e9:.1f} GB, and {folder.parent} has {free / 1e9:.1f} GB left. Make room, or name an "
            f"--output elsewhere."
        )


def meta_model(config: PreTrainedConfig, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model that a config describes, without storage for its weights."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    return model


# Passes


@dataclass(frozen=True)
class _Run:
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
        return [step for step in self.recipe.passes if isinstance(step, PrunePass)]

    @property
    def conversions(self) -> list[FolderPass]:
        return [step for step in self.recipe.passes if isinstance(step, FolderPass)]

    def found(self, resume: bool) -> Report | None:
        """The report of what an earlier run finished, whose checkpoint becomes the result so far."""
        found = self.unfinished.find([(step.name, as_plain(step)) for step in self.recipe.passes], resume)
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
        model = subject.load()
        _check_rotary(model, subject.name)
        count, size = parameters(model), checkpoint.weight_bytes(model)
        before = self.perplexity(model)
        outcomes = [
            prune(step, model, family, self.texts.calibration, self.plugins, self.progress) for step in self.pruning
        ]
        checkpoint.save(model, subject.tokenizer, folder, self.progress)
        for file in subject.companions:
            shutil.copy(file, folder)
        probe, dtype = checkpoint.probe(model, self.texts.calibration.tokens), model.dtype
        del model
        reloaded, verified = checkpoint.verify(
            folder, probe, dtype, device_of(settings), settings.trust_remote_code, self.progress
        )
        after, left = self.perplexity(reloaded), parameters(reloaded)
        report = Report(
            model=subject.name,
            parameters=Change(count["total"], left["total"]),
            non_embedding_parameters=Change(count["non_embedding"], left["non_embedding"]),
            bytes=Change(size, checkpoint.bytes_on_disk(folder)),
            perplexity=Change(before, after) if before and after else None,
            passes=tuple(outcomes),
            calibration=_describe(self.texts.calibration, settings.seed),
            verified=verified,
            seconds=0.0,
            stock=not hasattr(reloaded.config, "pruned"),
        )
        self.keep(report)
        return report

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
        with self.progress.libraries():
            if interpreter is None:
                done, versions = conversion.carry_out(*arguments), elsewhere.versions(step)
            else:
                done, versions = elsewhere.carry_out(interpreter, *arguments, room)
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
) -> Outcome:
    """Carries out one pruning pass on a model, in place: each decision is cut before the next is asked for.

    Raises:
        SurgeryError: the model's shape is not what the pass foresaw.
    """
    plugins.manager.hook.before_pass(step=step, model=model)
    before = family.shape(model)
    expected = step.foresee(before)
    cuts, evidence = Cuts(), []
    with Meter() as meter:
        for decision in step.decide(model, family, calibration, progress):
            surgery.carry_out(model, family, decision)
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
    plugins.manager.hook.pass_finished(outcome=outcome)
    return outcome


# What is written beside the weights


def _describe(calibration: Calibration, seed: int) -> dict[str, Any]:
    windows, length = calibration.tokens.shape
    return {"text": calibration.source, "windows": windows, "length": length, "bos": calibration.bos, "seed": seed}


def _write(folder: Path, recipe: Recipe, report: Report) -> None:
    aside = folder / "compression"
    aside.mkdir(exist_ok=True)
    cuts = [{"pass": outcome.name, **outcome.cuts.to_json()} for outcome in report.passes]
    (aside / "cuts.json").write_text(json.dumps(cuts, indent=2) + "\n", encoding="utf-8")
    (aside / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    (aside / "report.json").write_text(report.to_json() + "\n", encoding="utf-8")
    (folder / "README.md").write_text(report.model_card(recipe.to_yaml()), encoding="utf-8")
