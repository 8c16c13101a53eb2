"""The loop: a recipe's passes in order, then a checkpoint that was reloaded, measured and reported."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from optimum_prune import checkpoint, surgery
from optimum_prune.anatomy import Family, find_family, parameters
from optimum_prune.calibration import Calibration, draw
from optimum_prune.checkpoint import Probe
from optimum_prune.cuts import Cuts
from optimum_prune.errors import OutputError, RecipeError, SurgeryError, reason
from optimum_prune.evaluation import Perplexity, perplexity
from optimum_prune.measure import Meter
from optimum_prune.options import as_plain
from optimum_prune.passes import FolderPass, Outcome, Pass, PrunePass, Stage
from optimum_prune.plugins import Plugins
from optimum_prune.plugins import load as load_plugins
from optimum_prune.progress import Progress
from optimum_prune.recipe import Recipe, Settings
from optimum_prune.report import Change, Report
from optimum_prune.shape import Shape
from optimum_prune.staging import Staging, check_output, staged

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


@dataclass(frozen=True)
class Texts:
    """What passes choose by, and what is reported on."""

    calibration: Calibration
    evaluation: Calibration | None


@dataclass(frozen=True)
class Pruned:
    """A model that was pruned and saved: what was known of it before it is reloaded."""

    outcomes: tuple[Outcome, ...]
    parameters_before: Mapping[str, int]
    bytes_before: int
    perplexity_before: Perplexity | None
    probe: Probe
    dtype: torch.dtype


def compress(
    recipe: Recipe,
    output: str | Path,
    *,
    subject: Subject | None = None,
    texts: Texts | None = None,
    overwrite: bool = False,
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
        hooks: objects with `before_pass` or `pass_finished` marked `@hookimpl`, such as a tracker.
        progress: where to show progress; nowhere if not given.

    Raises:
        OptimumPruneError: whatever a user can mend; then there is no output folder.
    """
    progress = progress or Progress()
    plugins = load_plugins(hooks)
    check_output(Path(output), overwrite)
    subject = subject or open_subject(recipe.settings, progress, families=plugins.families)
    with Meter() as meter, staged(Path(output), overwrite, subject.source) as staging:
        family = find_family(subject.config, plugins.families)
        shape = family.shape(meta_model(subject.config, recipe.settings.trust_remote_code))
        foreseen = foresee(recipe.passes, shape)[-1]
        with progress.libraries():
            texts = texts or _draw(recipe, subject, family, plugins)
        _check_texts(texts, family.text_config(subject.config))
        _check_disk(staging.root, foreseen.parameters * checkpoint.item_size(subject.config, recipe.settings.dtype))
        pruned = _prune(recipe, subject, family, texts, plugins, staging, progress)
        reloaded, verified = checkpoint.verify(
            staging.result,
            pruned.probe,
            pruned.dtype,
            device_of(recipe.settings),
            recipe.settings.trust_remote_code,
            progress,
        )
        converted = _convert(recipe, texts, plugins, staging, progress)
        if any(outcome.stage is Stage.QUANTIZE for outcome in converted):
            reloaded = _load_result(staging.result, recipe.settings, progress)
        after = None if texts.evaluation is None else perplexity(reloaded, texts.evaluation, progress)
        count = parameters(reloaded)
        report = Report(
            model=subject.name,
            parameters=Change(pruned.parameters_before["total"], count["total"]),
            non_embedding_parameters=Change(pruned.parameters_before["non_embedding"], count["non_embedding"]),
            bytes=Change(pruned.bytes_before, checkpoint.bytes_on_disk(staging.result)),
            perplexity=Change(pruned.perplexity_before, after) if pruned.perplexity_before and after else None,
            passes=(*pruned.outcomes, *converted),
            calibration=_describe(texts.calibration, recipe.settings.seed),
            verified=verified,
            seconds=meter.seconds,
            stock=not hasattr(reloaded.config, "pruned"),
        )
        _write(staging.result, replace(recipe, settings=replace(recipe.settings, model=subject.name)), report)
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


# Before the weights are read


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


def _prune(
    recipe: Recipe,
    subject: Subject,
    family: Family,
    texts: Texts,
    plugins: Plugins,
    staging: Staging,
    progress: Progress,
) -> Pruned:
    """Loads the model, measures it, prunes it, and saves it. Unless the caller holds the model, it is gone afterwards."""
    model = subject.load()
    _check_rotary(model, subject.name)
    count, size = parameters(model), checkpoint.weight_bytes(model)
    before = None if texts.evaluation is None else perplexity(model, texts.evaluation, progress)
    steps = [step for step in recipe.passes if isinstance(step, PrunePass)]
    outcomes = tuple(prune(step, model, family, texts.calibration, plugins, progress) for step in steps)
    checkpoint.save(model, subject.tokenizer, staging.result, progress)
    for file in subject.companions:
        shutil.copy(file, staging.result)
    return Pruned(outcomes, count, size, before, checkpoint.probe(model, texts.calibration.tokens), model.dtype)


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


def _convert(
    recipe: Recipe, texts: Texts, plugins: Plugins, staging: Staging, progress: Progress
) -> tuple[Outcome, ...]:
    """Carries out the passes that go from folder to folder; `staging.result` becomes the last checkpoint."""
    outcomes = []
    for position, step in enumerate(recipe.passes):
        if not isinstance(step, FolderPass):
            continue
        plugins.manager.hook.before_pass(step=step, model=None)
        exports = step.stage is Stage.EXPORT
        target = staging.result / step.name if exports else staging.root / f"{position}-{step.name}"
        target.mkdir()
        with Meter() as meter:
            evidence = step.convert(staging.result, target, texts.calibration, progress)
        if not exports:
            staging.result = target
        outcomes.append(
            Outcome(step.name, step.stage, as_plain(step), meter.seconds, meter.peak_memory, evidence=(evidence,))
        )
        plugins.manager.hook.pass_finished(outcome=outcomes[-1])
    return tuple(outcomes)


def _load_result(folder: Path, settings: Settings, progress: Progress) -> PreTrainedModel:
    """The checkpoint that a quantization pass left, as stock transformers reads it."""
    from transformers import AutoModelForCausalLM

    with progress.libraries():
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            folder, dtype="auto", trust_remote_code=settings.trust_remote_code
        )
    return model.to(device_of(settings)).eval()


# What is written beside the weights


def _describe(calibration: Calibration, seed: int) -> dict[str, Any]:
    windows, length = calibration.tokens.shape
    return {"text": calibration.source, "windows": windows, "length": length, "bos": calibration.bos, "seed": seed}


def _write(folder: Path, recipe: Recipe, report: Report) -> None:
    aside = folder / "compression"
    aside.mkdir()
    cuts = [{"pass": outcome.name, **outcome.cuts.to_json()} for outcome in report.passes]
    (aside / "cuts.json").write_text(json.dumps(cuts, indent=2) + "\n", encoding="utf-8")
    (aside / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    (aside / "report.json").write_text(report.to_json() + "\n", encoding="utf-8")
    (folder / "README.md").write_text(report.model_card(recipe.to_yaml()), encoding="utf-8")
