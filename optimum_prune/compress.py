"""The loop: a recipe's passes in order, then a checkpoint that was reloaded, measured and reported."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from optimum_prune import checkpoint, distributed
from optimum_prune.anatomy import Family, find_family
from optimum_prune.calibration import draw, texts_to_use
from optimum_prune.errors import OutputError, RecipeError
from optimum_prune.measure import Meter, give_back
from optimum_prune.passes import FolderPass, Pass, PrunePass
from optimum_prune.plugins import Plugins
from optimum_prune.plugins import load as load_plugins
from optimum_prune.progress import Progress
from optimum_prune.prospect import Prospect
from optimum_prune.recipe import Recipe, Settings
from optimum_prune.report import Report
from optimum_prune.run import Run, Texts
from optimum_prune.shape import Shape
from optimum_prune.staging import check_output, staged
from optimum_prune.subject import Subject, device_of, length_limit, meta_model, open_subject
from optimum_prune.unfinished import Unfinished, files_fingerprint, windows_fingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


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
        resume: refuse to begin anew where a run that ended early is of another model, text or passes; one of the same goes on in any case.
        hooks: objects with `before_pass` or `pass_finished` marked `@hookimpl`, such as a tracker.
        progress: where to show progress; nowhere if not given.

    Raises:
        OptimumPruneError: whatever a user can mend; then there is no output folder. What was finished by then is kept beside it if
            the same run, or its later passes mended, can go on from there; the message says where.
    """
    progress = progress if progress is not None and distributed.first() else Progress()
    plugins = load_plugins(hooks)
    check_output(Path(output), overwrite)
    subject = subject or open_subject(recipe.settings, progress, families=plugins.families)
    with Meter() as meter, staged(Path(output), overwrite, subject.source) as staging:
        family = find_family(subject.config, plugins.families)
        shape = family.shape(meta_model(subject.config, recipe.settings.trust_remote_code))
        foreseen = foresee(recipe.passes, shape)[-1]
        check_conversions(recipe.passes, Prospect(subject.config, family, foreseen))
        with progress.libraries(datasets=texts is None and _reads_datasets(recipe)):
            texts = distributed.by_first(lambda: texts or _draw(recipe, subject, family, plugins))
        give_back()  # tokenizing takes much more than tokens do
        _check_texts(texts, family.text_config(subject.config))
        _check_disk(staging.root, foreseen.parameters * checkpoint.item_size(subject.config, recipe.settings.dtype))
        unfinished = Unfinished(Path(output), _identity(recipe.settings, subject, texts))
        run = Run(recipe, texts, plugins, staging, unfinished, progress, meter)
        report = distributed.by_first(lambda: run.found(resume))
        with unfinished.told():
            report = report or run.pruned(subject, family)
            if distributed.first():
                with distributed.alone():
                    report = run.converted(report)
        report = replace(report, seconds=report.seconds + meter.seconds)
        if distributed.first():
            _write(staging.result, replace(recipe, settings=replace(recipe.settings, model=subject.name)), report)
    if distributed.first():
        unfinished.remove()
    return distributed.by_first(lambda: report)


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
        if not step.takes_experts and any(layer.expert_width for layer in prospect.shape.layers):
            raise RecipeError(
                f"'{step.name}' would leave the experts of this mixture as they are, and so most of its weights: it knows linear layers only. "
                f"Leave '{step.name}' out."
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


def _reads_datasets(recipe: Recipe) -> bool:
    return any(text.named and text.text is None for text in texts_to_use(recipe.calibration, recipe.evaluation))


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


# What is written beside the weights


def _write(folder: Path, recipe: Recipe, report: Report) -> None:
    aside = folder / "compression"
    aside.mkdir(exist_ok=True)
    cuts = [{"pass": outcome.name, **outcome.cuts.to_json()} for outcome in report.passes]
    (aside / "cuts.json").write_text(json.dumps(cuts, indent=2) + "\n", encoding="utf-8")
    (aside / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    (aside / "report.json").write_text(report.to_json() + "\n", encoding="utf-8")
    (folder / "README.md").write_text(report.model_card(recipe.to_yaml()), encoding="utf-8")
